"""Where prompts come from: a cursor over a dataset, and a buffer of groups to finish first.

A group is the n_samples_per_prompt samples of one prompt. Prompts a, b, c, n_samples_per_prompt=2, not shuffled:

    get_samples(2)  ->  [[a0 a1] [b2 b3]]      group_index 0, 1;  index 0..3;  cursor: epoch 0, offset 2
    get_samples(2)  ->  [[c4 c5] [a6 a7]]      group_index 2, 3;  index 4..7;  cursor: epoch 1, offset 1
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slime.data.dataset import Dataset
from slime.rollout.state_file import read_state, write_state
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.misc import load_function
from slime.utils.types import PrefixCacheInfo, Sample, SpecInfo

logger = logging.getLogger(__name__)

Groups = list[list[Sample]]


class DataSource(ABC):
    """The protocol of --data-source-path: a class made with `args`. One instance serves the whole run."""

    @abstractmethod
    def get_samples(self, num_samples: int) -> Groups:
        """The next `num_samples` groups."""

    @abstractmethod
    def add_samples(self, samples: Groups) -> None:
        """Takes groups back, to be given out again."""

    @abstractmethod
    def save(self, rollout_id: int) -> None:
        """Writes everything that the order of later samples depends on."""

    @abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Continues as if the process had never stopped after `save(rollout_id)`."""

    @abstractmethod
    def __len__(self) -> int:
        """Prompts of one epoch."""


class RolloutDataSource(DataSource):
    """Prompts of `args.prompt_data` in order, epoch after epoch, in another order each with args.rollout_shuffle.

    With args.rollout_global_dataset off there is no file: samples are empty and the rollout function fills them.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.epoch_id = 0
        self.sample_offset = 0  # prompts of this epoch given out
        self.sample_group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}  # a plug-in's own state, saved with the cursor
        self.dataset = _load_dataset(args) if args.rollout_global_dataset else None
        self._order_epoch()

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    def get_samples(self, num_samples: int) -> Groups:
        return [self._make_group(prototype) for prototype in self._next_prototypes(num_samples)]

    def add_samples(self, samples: Groups) -> None:
        raise ValueError(
            "RolloutDataSource takes no samples back. "
            "Use --data-source-path slime.rollout.data_source.RolloutDataSourceWithBuffer."
        )

    def get_metadata(self) -> dict[str, Any]:
        return self.metadata

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        self.metadata.update(metadata)

    def save(self, rollout_id: int) -> None:
        if self.args.save is None:
            raise ValueError("the data source cannot be saved: --save is not given")
        write_state(_state_path(self.args.save, rollout_id), self.state_dict())

    def load(self, rollout_id: int | None = None) -> None:
        """Reads the state that `save(rollout_id)` wrote, from the folder args.load.

        Without args.load, or with a rollout_id of None or -1 (a run that starts at rollout 0), the source stays at its
        beginning. Raises ValueError where the state should be there and is not, or does not fit the prompts.
        """
        if self.args.load is None or rollout_id is None or rollout_id < 0:
            return
        path = _state_path(self.args.load, rollout_id)
        if not path.is_file():
            raise ValueError(
                f"cannot continue after rollout {rollout_id}: {path} does not exist, so the prompts already used are "
                "not known. Use --start-rollout-id 0 to start from the first prompt."
            )
        self.load_state_dict(read_state(path))
        logger.info("data source at epoch %d, prompt %d of %d", self.epoch_id, self.sample_offset, len(self))

    def state_dict(self) -> dict[str, Any]:
        """The resumable state, in JSON types."""
        return {
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": self.metadata,
            "num_prompts": len(self),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError where an entry is missing or the prompts are others."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"the saved state of the data source lacks {', '.join(missing)}")
        if state["num_prompts"] != len(self):
            raise ValueError(
                f"the saved state belongs to {state['num_prompts']} prompts, --prompt-data now has {len(self)}: its "
                "place in them has no meaning. Give the same --prompt-data and --rollout-max-prompt-len, "
                "or use --start-rollout-id 0."
            )
        self.sample_offset = state["sample_offset"]
        self.epoch_id = state["epoch_id"]
        self.sample_group_index = state["sample_group_index"]
        self.sample_index = state["sample_index"]
        self.metadata = state["metadata"]
        self._order_epoch()

    def _order_epoch(self) -> None:
        if self.dataset is not None and self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def _next_prototypes(self, num_samples: int) -> list[Sample]:
        """The next prompts, over as many ends of an epoch as it takes; the next epoch begins with its first prompt."""
        if self.dataset is None:
            return [Sample() for _ in range(num_samples)]
        prototypes: list[Sample] = []
        while len(prototypes) < num_samples:
            if self.sample_offset == len(self.dataset):
                self.epoch_id += 1
                self.sample_offset = 0
                self._order_epoch()
            stop = min(self.sample_offset + num_samples - len(prototypes), len(self.dataset))
            prototypes += self.dataset.samples[self.sample_offset : stop]
            self.sample_offset = stop
        return prototypes

    def _make_group(self, prototype: Sample) -> list[Sample]:
        group = []
        shared, owned = _split_fields(prototype)
        for _ in range(self.args.n_samples_per_prompt):
            sample = Sample.__new__(Sample)
            sample.__dict__ = shared | {name: _copy_value(value) for name, value in owned.items()}
            sample.group_index = self.sample_group_index
            sample.index = self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """A `RolloutDataSource` that gives out the groups handed to `add_samples` before new prompts.

    args.buffer_filter_path names `f(args, rollout_id, buffer, num_samples) -> groups`, which takes at most num_samples
    groups out of `buffer`; default `pop_first`. The buffer is part of the saved state, `under_way()` before it.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.buffer: Groups = []
        self.under_way: Callable[[], Groups] = list  # taken by a rollout that outlives its call, and not yet trained on
        self.buffer_filter: Callable[..., Groups] = (
            pop_first if args.buffer_filter_path is None else load_function(args.buffer_filter_path)
        )

    def get_samples(self, num_samples: int) -> Groups:
        groups = self._from_buffer(num_samples)
        return groups + super().get_samples(num_samples - len(groups))

    def add_samples(self, samples: Groups) -> None:
        """Appends whole groups. Raises ValueError, and keeps none, if one is not of n_samples_per_prompt samples.

        Siblings that one generate call fanned out, which share a `rollout_id`, count as one.
        """
        for group in samples:
            if (num_samples := _num_generated(group)) != self.args.n_samples_per_prompt:
                raise ValueError(
                    f"a group of {num_samples} samples cannot be buffered: --n-samples-per-prompt is "
                    f"{self.args.n_samples_per_prompt}"
                )
        self.buffer.extend(samples)

    def get_buffer_length(self) -> int:
        """Groups in the buffer."""
        return len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        groups = [*self.under_way(), *self.buffer]
        return super().state_dict() | {"buffer": [[sample.to_dict() for sample in group] for group in groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.buffer = [[Sample.from_dict(sample) for sample in group] for group in state["buffer"]]

    def _from_buffer(self, num_samples: int) -> Groups:
        if not self.buffer or num_samples == 0:
            return []
        groups = self.buffer_filter(self.args, None, self.buffer, num_samples)
        kept = {id(group) for group in self.buffer}
        num_left_inside = sum(id(group) in kept for group in groups)
        if len(groups) > num_samples or num_left_inside:
            raise ValueError(
                f"--buffer-filter-path {self.args.buffer_filter_path} must take at most {num_samples} groups out of "
                f"the buffer; it returned {len(groups)}, {num_left_inside} of them still in the buffer"
            )
        return groups


def _num_generated(group: list[Sample]) -> int:
    """Generate calls that the samples of a group come from, or will."""
    return len({("sample", id(s)) if s.rollout_id is None else ("siblings", s.rollout_id) for s in group})


def pop_first(args: Any, rollout_id: int | None, buffer: Groups, num_samples: int) -> Groups:
    """Takes the oldest `num_samples` groups out of `buffer`, or all there are."""
    groups = buffer[:num_samples]
    del buffer[:num_samples]
    return groups


def _load_dataset(args: Any) -> Dataset:
    if args.prompt_data is None:
        raise ValueError("--prompt-data is not given. Name a file of prompts, or use --disable-rollout-global-dataset.")
    needs_tokenizer = args.apply_chat_template or args.rollout_max_prompt_len is not None
    return Dataset(
        args.prompt_data,
        tokenizer_of(args) if needs_tokenizer else None,
        max_prompt_len=args.rollout_max_prompt_len,
        input_key=args.input_key,
        label_key=args.label_key,
        metadata_key=args.metadata_key,
        tool_key=args.tool_key,
        metadata_columns=tuple(args.metadata_columns),
        completion_key=args.completion_key,
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        seed=args.rollout_seed,
    )


def _state_path(folder: str, rollout_id: int) -> Path:
    return Path(folder) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"


def _split_fields(sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields that copies may share, being immutable, and those that each copy must own."""
    owned = {name: value for name, value in sample.__dict__.items() if not _is_immutable(value)}
    return {name: value for name, value in sample.__dict__.items() if name not in owned}, owned


def _is_immutable(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _copy_value(value: Any) -> Any:
    """A deep copy, much faster than `copy.deepcopy`: no memo, a prototype is a tree."""
    if type(value) is list:
        return [_copy_value(entry) for entry in value] if value else []
    if type(value) is dict:
        return {key: _copy_value(entry) for key, entry in value.items()} if value else {}
    if _is_immutable(value):
        return value
    if isinstance(value, SpecInfo | PrefixCacheInfo):  # counters only
        counters = object.__new__(type(value))
        counters.__dict__.update(value.__dict__)
        return counters
    return copy.deepcopy(value)
