"""What lies in files: manifests, lists of recordings, transcripts."""
