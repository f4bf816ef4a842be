"""Rewrite videos: frames are changed; times, sound, subtitles, chapters and tags are copied."""

from .formats import SUFFIXES, output_path
from .fusion import fuse_neighbours
from .overlap import QUEUE, Change, Picture
from .rewriting import VideoOptions, check, rewrite

__all__ = [
    "QUEUE",
    "SUFFIXES",
    "Change",
    "Picture",
    "VideoOptions",
    "check",
    "fuse_neighbours",
    "output_path",
    "rewrite",
]
