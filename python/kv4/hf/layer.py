"""KV4Layer: one attention layer of a transformers cache, its keys and values in the kv4 core."""

from __future__ import annotations

import io
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kv4._core import PAGE_TOKENS
from kv4.messages import mismatch, whole_number
from kv4.recipe import Recipe

from . import ops
from .device import DTYPES, check_device, check_dtype, existing_device, new_core, on_stream, place, readable
from .files import Source
from .handle import NEVER, Form, Held, KVHandle

# Attributes that belong to the process, and to no pickle.
_OF_PROCESS = ("core", "number", "state", "appended", "_newest")


class KV4Layer(CacheLayerMixin):
    """One attention layer's keys and values in the kv4 core.

    `update` appends and returns handles (see KVHandle); the kv4 attention attends through them. Sealing of what is
    due happens in the core at the next update. The core is made at the first update, from its shapes, dtype and
    device. On a CUDA device everything is queued on torch's current stream and nothing waits.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        recipe: Recipe,
        sliding_window: int | None = None,
        constants: Mapping[str, Any] | None = None,
        layer_type: str = "full_attention",
        cross_attention: bool = False,
        rank: tuple[int, int] = (0, 1),
        **kwargs: Any,
    ) -> None:
        """rank: which of how many layers it is, which a recipe with a budget asks for."""
        # Not the base constructor: `keys` and `values` are read-only views here.
        self.recipe = recipe
        self.layer_type = layer_type
        # Of an encoder's states: updated once, then read by every call through `keys` and `values`.
        self.cross_attention = bool(cross_attention)
        self.sliding_window = int(sliding_window) if sliding_window else 0
        self.is_sliding = bool(self.sliding_window)
        self.constants = dict(constants or {})
        self.rank = rank
        self.version = 0
        self._record_past = False
        self._forget()

    def _forget(self) -> None:
        self.core: Any = None
        self.form = Form()
        self.is_initialized = False
        self.seen = 0
        self.batch = 0
        self.converts = False  # keys or values have come in another dtype than the layer's
        # The state that the newest update's handles refer to, while the layer is unchanged.
        self._newest: weakref.ref[Held] | None = None
        # What a compiled graph knows of the layer: see ops.py.
        self.number = 0
        self.state: torch.Tensor | None = None
        self.appended: tuple[KVHandle, KVHandle] | None = None  # handles of the newest kv4::append, until a change
        self.sealed_version = -1  # that a read of a cross-attention layer has sealed

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the core for keys [batch, kv_heads, T >= 0, head_dim] and values like them, in the dtype that torch
        promotes both to; on a CUDA device, which has no kernels of float32, under torch.autocast in its dtype.
        Errors: ValueError for a wrong rank, device or dtype; NotImplementedError or ValueError, with the core's
        reason, where the recipe does not serve the head dims or the device."""
        for name, x in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                got = x if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(mismatch(name, "a tensor [batch, kv_heads, tokens, head_dim]", got))
            check_device(name, x.device)
            check_dtype(name, x)
        if value_states.device != key_states.device:
            raise ValueError(mismatch("value_states", f"a tensor on {place(key_states.device)}", value_states.device))
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        if dtype is torch.float32 and key_states.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")  # which torch's attention reads, and the device's kernels serve
        self._make_core(key_states.device, dtype, (key_states.shape[1], key_states.shape[3], value_states.shape[3]))
        self.batch = key_states.shape[0]

    def _make_core(self, device: torch.device, dtype: torch.dtype, dims: tuple[int, int, int]) -> None:
        """dims: kv_heads, head_dim_k, head_dim_v."""
        sizes = dict(zip(("kv_heads", "head_dim_k", "head_dim_v"), dims, strict=True))
        window = self.sliding_window
        self.recipe = self.recipe.at(*dims[1:], *self.rank)
        core = new_core(device, self.recipe, dtype=DTYPES[dtype], sliding_window=window, **sizes, **self.constants)
        if self._record_past:
            core.record_past(True)
        self.core = core
        self.form = Form(
            dtype,
            device,
            device.type == "cuda",
            *dims,
            sliding_window=window,
            attends_exact_call=self.recipe.seal != "arrival",
            records_queries=self.recipe.seal == "page",
        )
        self.number = ops.enter(self)
        self.state = torch.empty(0, device=device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Appends keys [batch, kv_heads, T, head_dim] and values like them (any strides with unit channel stride;
        copied otherwise) and returns their handles. The first call fixes the layer's dtype, the one that torch promotes
        keys and values to; another one, as under torch.autocast, is converted to it. Errors: ValueError naming the
        argument for a shape or device that is not the layer's, or float64; the layer stays as it was."""
        if torch.compiler.is_dynamo_compiling():
            if not self.is_initialized:
                return _update_uncompiled(self, key_states, value_states)
            ticket = ops.append(self.state, key_states, value_states, self.number)
            return ops.CompiledHandle(self, "key", ticket), ops.CompiledHandle(self, "value", ticket)
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key_states, value_states)
        try:
            if self.converts:
                key_states, value_states = self._converted(key_states, value_states)
            try:
                self._change(self.core.append, key_states, value_states)
            except MemoryError:
                if self.form.on_device:
                    torch.cuda.empty_cache()  # what torch holds unused
                self._change(self.core.append, *self._converted(key_states, value_states))
            except (ValueError, RuntimeError):
                # It may have been the dtype or the strides alone.
                key_states, value_states = self._converted(key_states, value_states)
                self._change(self.core.append, key_states, value_states)
        except BaseException:
            if fresh:
                self._forget()
            raise
        tokens = key_states.shape[2]
        before, window = self.seen, self.sliding_window
        self.seen = length = before + tokens
        self.batch = batch = key_states.shape[0]
        columns = length if not window or before < window else tokens + window - 1
        held = Held(self.core, self.form, batch, length, columns)
        self._newest = weakref.ref(held)
        if tokens > PAGE_TOKENS:
            return KVHandle(held, "key", key_states.detach()), KVHandle(held, "value", value_states.detach())
        return KVHandle(held, "key", None), KVHandle(held, "value", None)

    def _converted(self, key_states: torch.Tensor, value_states: torch.Tensor) -> list[torch.Tensor]:
        """Both as the core reads them, where the layer can take them. Errors: see update."""
        form = self.form
        converted = []
        for name, x in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(x, torch.Tensor):
                raise ValueError(mismatch(name, "a tensor", type(x).__name__))
            if x.device != form.device:
                raise ValueError(mismatch(name, f"a tensor on {place(form.device)}", x.device))
            check_dtype(name, x)
            self.converts |= x.dtype is not form.dtype
            converted.append(readable(x.to(form.dtype)))
        return converted

    def _change(self, operation: Callable[..., Any], *args: Any) -> None:
        """An operation of the core that changes what the layer holds: handles that are alive keep what they have."""
        if self.form.on_device:
            on_stream(self.core, self.form.device)
        self.appended = None
        held = None if self._newest is None else self._newest()
        if held is None:
            operation(*args)
        else:
            held.core = self.core.clone()
            try:
                operation(*args)
            except BaseException:
                held.core = self.core
                raise
        self._newest = None
        self.version += 1

    def disown(self) -> None:
        """After a step was captured, which no core has counted: its handles are stale."""
        held = None if self._newest is None else self._newest()
        if held is not None:
            held.core = NEVER
        self._newest = self.appended = None

    def seal(self) -> None:
        """Seals now what the next update would, and frees its memory: for a layer that is set aside, such as a stored
        prompt's, or not updated again. From then on the layer behaves as after that update. The only loss: a crop into
        the tokens of the last call no longer restores them exactly."""
        if self.core is not None:
            self._change(self.core.seal)

    def reserve(self, tokens: int) -> None:
        """Reserves memory for `tokens` more tokens, so that steps allocate nothing."""
        if self.core is not None:
            on_stream(self.core, self.form.device)
            self.core.reserve(tokens)

    def advance(self) -> None:
        """Before each replay of a captured step: seals what is due and counts one more token (see DecodeGraph)."""
        self._change(self.core.advance)
        self.seen += 1

    def dense(self, which: str, first: int, count: int) -> torch.Tensor:
        """Positions [first, first + count) of the "key" or "value" side, dequantised: [batch, kv_heads, count, dim]
        in the model's dtype. Errors: IndexError for positions that are not held."""
        return Held(self.core, self.form, self.batch, self.seen, count).dense(which, first, count)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        return self.form.device

    @property
    def kv_heads(self) -> int:
        return self.form.kv_heads

    @property
    def head_dim_k(self) -> int:
        return self.form.head_dim_k

    @property
    def head_dim_v(self) -> int:
        return self.form.head_dim_v

    @property
    def keys(self) -> torch.Tensor | KVHandle | None:
        """All keys a next query may see, dequantised (a copy), or None before the first update; of a cross-attention
        layer their handle, as update returns it, once what is due is sealed."""
        return self._view("key")

    @property
    def values(self) -> torch.Tensor | KVHandle | None:
        """All values a next query may see, as `keys` has the keys."""
        return self._view("value")

    def _view(self, which: str) -> torch.Tensor | KVHandle | None:
        if not self.is_initialized:
            return None
        if self.cross_attention:
            return _read_sealed(self, which)
        columns, first = self.get_mask_sizes(0)
        return self.dense(which, first, columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, position of column 0) that a call of `query_length` more tokens will attend to."""
        window = self.sliding_window
        offset = self.seen - window + 1 if window and self.seen >= window else 0
        return self.seen + query_length - offset, offset

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def record_past(self) -> bool:
        return self._record_past

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self._record_past = bool(on)
        if self.core is not None:
            self.core.record_past(self._record_past)

    def activate_past_recording(self) -> None:
        """From now on the tokens of the last call can be cropped without loss, even in a sliding window."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest -tokens_to_remove tokens; 0 drops none. Errors: ValueError for a positive number;
        IndexError for more tokens than the layer has, or where a sliding window has evicted what would be needed
        (activate_past_recording prevents it)."""
        remove = self.checked_crop(tokens_to_remove)
        if remove:
            try:
                self._change(self.core.crop, self.seen - remove)
            except IndexError as error:
                raise IndexError(self._past_window(tokens_to_remove)) from error
            self.seen -= remove

    def checked_crop(self, tokens_to_remove: int) -> int:
        """Tokens that crop(tokens_to_remove) drops. Errors: see crop, but for what a window has evicted."""
        n = whole_number("tokens_to_remove", tokens_to_remove)
        if n > 0:
            raise ValueError(mismatch("tokens_to_remove", "0 or a negative number of tokens", n))
        if not self.is_initialized:
            return 0
        if -n > self.seen:
            raise IndexError(mismatch("tokens_to_remove", f"between {-self.seen} and 0", n))
        return -n

    def _past_window(self, tokens_to_remove: int) -> str:
        """The message for a crop that a sliding window's eviction prevents."""
        most = self.seen - (self.core.first + self.sliding_window - 1)
        expected = f"at least {-max(most, 0)}, as older tokens have left the sliding window of {self.sliding_window}"
        expected += " (activate_past_recording() before the tokens come keeps what a crop needs)"
        return mismatch("tokens_to_remove", expected, int(tokens_to_remove))

    def select(self, rows: list[int]) -> None:
        """The new batch: sequence i continues old sequence rows[i]. Errors: IndexError for a row out of range."""
        if self.core is not None and self.core.batch:
            self._change(self.core.select, rows)
            self.batch = len(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select(row_numbers("beam_idx", beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(rows_of_index(indices, self.batch))

    def batch_repeat_interleave(self, repeats: int) -> None:
        times = whole_number("repeats", repeats)
        if times < 1:
            raise ValueError(mismatch("repeats", "at least 1", times))
        if self.core is not None and self.core.batch:
            self._change(self.core.repeat, times)
            self.batch *= times

    def reset(self) -> None:
        """Back to empty, open to another batch, dtype or shape; the memory is returned."""
        self._forget()
        self.version += 1

    def offload(self) -> None:
        """Nothing to do: packed pages stay where attention reads them."""

    def prefetch(self) -> None:
        """Nothing to do: packed pages stay where attention reads them."""

    def nbytes(self) -> int:
        """Every byte the core holds for this layer, with tables that other layers may use as well (a rotation's, one
        in a process for all that define it alike)."""
        return self.core.nbytes() if self.core is not None else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> KV4Layer:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        if self.is_initialized:
            on_stream(self.core, self.form.device)
            twin.core = self.core.clone()
            twin.number = ops.enter(twin)
        twin._newest = twin.appended = None
        return twin

    def load(self, device: torch.device, dtype: torch.dtype, dims: tuple[int, int, int], source: Source) -> None:
        """An empty layer takes what a core of these dims (kv_heads, head_dim_k, head_dim_v) saved. Errors: ValueError
        for other bytes."""
        self._make_core(device, dtype, dims)
        on_stream(self.core, device)
        self.core.load(source.readinto)
        self.core.record_past(self._record_past)
        self.seen, self.batch = self.core.length, self.core.batch
        self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        """Its attributes, and the core by what it saves."""
        state = {name: value for name, value in vars(self).items() if name not in _OF_PROCESS}
        if self.core is not None:
            on_stream(self.core, self.device)
            data = io.BytesIO()
            self.core.save(data.write)
            state["saved"] = data.getvalue()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Errors: ValueError where the layer's device is not here."""
        self._forget()
        data = state.get("saved")
        vars(self).update({name: value for name, value in state.items() if name != "saved"})
        if data is not None:
            dims = (self.kv_heads, self.head_dim_k, self.head_dim_v)
            self.load(existing_device("layer", self.device), self.dtype, dims, Source(io.BytesIO(data), "a pickle"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layer_type}, tokens={self.seen}, nbytes={self.nbytes()})"


@torch.compiler.disable
def _read_sealed(layer: KV4Layer, which: str) -> KVHandle:
    """The handle of a cross-attention layer. The call that updated it has its own: this is a later one, and since no
    other update may ever come, it seals what is due."""
    if layer.version != layer.sealed_version:
        layer.seal()
        layer.sealed_version = layer.version
    held = None if layer._newest is None else layer._newest()
    if held is None:
        held = Held(layer.core, layer.form, layer.batch, layer.seen, layer.get_mask_sizes(0)[0])
        layer._newest = weakref.ref(held)
    return KVHandle(held, which, None)


@torch.compiler.disable
def _update_uncompiled(layer: KV4Layer, *args: torch.Tensor) -> tuple[KVHandle, KVHandle]:
    return layer.update(*args)


def rows_of_index(indices: Any, batch: int) -> list[int]:
    """Row numbers of an index as torch reads it on a batch: integers (negative from the end), a bool mask, a slice.
    Errors: IndexError for anything else."""
    try:
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices).cpu()
        return torch.arange(batch)[indices].reshape(-1).tolist()
    except (IndexError, TypeError, ValueError, RuntimeError):
        expected = f"integers from {-batch} to {batch - 1}, a mask of {batch} or a slice"
        raise IndexError(mismatch("indices", expected, repr(indices))) from None


def row_numbers(argument: str, given: Any) -> list[int]:
    """Those of a tensor or a sequence. Errors: ValueError for anything else."""
    try:
        return [operator.index(row) for row in (given.tolist() if isinstance(given, torch.Tensor) else given)]
    except TypeError:
        raise ValueError(mismatch(argument, "the numbers of rows", repr(given))) from None
