"""What a run needs before its first step."""
