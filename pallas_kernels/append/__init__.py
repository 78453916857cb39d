"""Writing one new token of each row into a packed cache, where it lies."""

from pallas_kernels.append.api import append_token, choose
from pallas_kernels.append.arguments import ExactWindow, KeyEncoder, StoredTokens, Token
from pallas_kernels.append.reference import Sketch, encode_keys

__all__ = [
    "ExactWindow",
    "KeyEncoder",
    "Sketch",
    "StoredTokens",
    "Token",
    "append_token",
    "choose",
    "encode_keys",
]
