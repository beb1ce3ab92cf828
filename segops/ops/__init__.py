"""The operators. Importing a module here puts its op into the table; the functions stay in their modules."""

from .. import _dispatch
from . import local_attention

__all__ = ["local_attention"]

_dispatch.apply_environment()
