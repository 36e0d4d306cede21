"""What every package may use: files, progress, the life of a process. Nothing here knows of models."""
