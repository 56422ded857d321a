"""A server on top of one model: requests in, transcripts out."""
