"""What runs inside the user's process: stdlib and attrs only, small, and quick to import."""
