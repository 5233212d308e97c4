"""Files on disk and on the Hub: atomic writes, folders, downloads, adapters."""
