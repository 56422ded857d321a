"""Many recordings: read ahead, written as they are done, resumed."""
