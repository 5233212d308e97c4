"""Errors a user can cause. Every message is one sentence that says what to do."""


class KhalaError(Exception):
    """Base of all errors shown to users; the command line prints it and exits with 1."""


class ConfigError(KhalaError):
    """A config.json that is malformed, incomplete or contradicts itself."""


class WeightsError(KhalaError):
    """A model folder whose files or tensors do not match its config."""


class AdapterError(KhalaError):
    """An adapter that cannot be read, or that does not fit the model it is for."""


class PromptError(KhalaError):
    """A prompt that cannot be built or does not fit."""


class ConvertError(KhalaError):
    """A foreign checkpoint that cannot be read or converted."""


class NoSongError(KhalaError):
    """None of some songs that were composed together came to anything; others may."""


class HubError(KhalaError):
    """A file that cannot be fetched from the Hugging Face Hub."""


class AudioError(KhalaError):
    """An audio or codes file that cannot be read, written or played."""


class KhalaWarning(UserWarning):
    """Something the user should know, though the work continues."""
