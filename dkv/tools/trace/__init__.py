"""What a cache did in one generation: a record of every step, a heat map of it, and a page to step through it.

>>> from dkv.tools import trace
>>> found = trace.record(model, tokenizer, input_ids, max_new_tokens=64, cache=dkv.DecodeCache(refresh=8))
>>> trace.write_page(found, "trace.html"), trace.write_picture(found, "trace.png")
"""

from dkv.tools.trace.files import write_json, write_page, write_picture
from dkv.tools.trace.record import Trace, record

__all__ = ["Trace", "record", "write_json", "write_page", "write_picture"]
