"""The only room that builds objects: start in order, drain, stop in reverse."""

from deltaserve.app.process import serve

__all__ = ["serve"]
