"""Files -> token batches: files, formats, templates, reading, corpus, packing, schedule, batches, in the order in which data flows."""

from mftcoder_coba.data.accounting import Count, Skipped, SplitAccounting
from mftcoder_coba.data.batches import Batch, collate, padded_length
from mftcoder_coba.data.corpus import Corpus, prepare
from mftcoder_coba.data.packing import pack
from mftcoder_coba.data.samples import TaskData
from mftcoder_coba.data.schedule import BalancerStream, Epoch, Row, TrainSchedule, shares_of, validation_rows
from mftcoder_coba.data.templates import Template, choose, load_tokenizer

__all__ = [
    "BalancerStream",
    "Batch",
    "Corpus",
    "Count",
    "Epoch",
    "Row",
    "Skipped",
    "SplitAccounting",
    "TaskData",
    "Template",
    "TrainSchedule",
    "choose",
    "collate",
    "load_tokenizer",
    "pack",
    "padded_length",
    "prepare",
    "shares_of",
    "validation_rows",
]
