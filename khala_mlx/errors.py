"""Errors that a user can cause. Each message is one line: what is wrong, and what to do."""


class KhalaError(Exception):
    """Base of all errors shown to users; the command line prints it and exits with 1."""


class ConfigError(KhalaError):
    """A config.json is malformed, incomplete or contradicts itself."""


class PromptError(KhalaError):
    """A prompt cannot be built or does not fit."""


class ConvertError(KhalaError):
    """A checkpoint cannot be read or converted."""


class NoSongError(KhalaError):
    """All songs that were composed together failed; other seeds may work."""


class HubError(KhalaError):
    """A file cannot be downloaded from the Hugging Face Hub."""


class AudioError(KhalaError):
    """An audio or codes file cannot be read, written or played."""


class KhalaWarning(UserWarning):
    """Something the user should know, while the work continues."""
