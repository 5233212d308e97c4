"""From tags and lyrics to token ids."""
