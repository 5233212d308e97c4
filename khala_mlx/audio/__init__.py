"""Sound: files, tags, loudness, mastering, pictures, playback."""
