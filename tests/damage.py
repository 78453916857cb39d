"""What can happen to the files of a checkpoint."""


def largest(checkpoint):
    """The largest file of its arrays."""
    return max(checkpoint.rglob("d/*"), key=lambda file: file.stat().st_size)


def flip_a_byte(checkpoint):
    """Changes a byte in the middle of that."""
    file = largest(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
