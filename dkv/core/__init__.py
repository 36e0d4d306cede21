"""What the model, the policies and the engine share: rows and their state, schedules, keys and values."""
