"""What every command stands on: how it ends, files, devices, runs that can be watched."""
