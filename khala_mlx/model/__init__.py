"""The three models of a song: backbone, superres and codec. They know no files but weights."""

from collections.abc import Callable

# Called with the steps that are done and the steps of the whole stage.
Progress = Callable[[int, int], None]
