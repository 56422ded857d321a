"""What a user asks for: recipe files, checked."""
