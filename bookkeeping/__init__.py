"""What is kept of training runs and painted lists: logs, trackers, reports."""
