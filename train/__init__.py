"""Training of decoders on text: data, objective, optimizer steps, checkpoints and the job."""
