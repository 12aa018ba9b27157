"""What every command stands on: how it ends, files, signals, devices."""
