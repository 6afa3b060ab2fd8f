"""A stranger's pickle runs nothing, whatever it holds, and what was refused is named."""

import contextlib
import copyreg
import functools
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess

import numpy as np
import pytest
import torch

from cdm_ray.errors import ConfigError
from cdm_ray.networks.published import Published, read_edm_pickle
from tests.edm_pickles import (
    Call,
    Persistent,
    checkpoint,
    dumps,
    loads,
    module_state,
    tiny_network,
)


@pytest.fixture
def marker(tmp_path):
    """A file that the hostile pickles write."""
    return tmp_path / "marker"


@pytest.fixture
def refusal(tmp_path, marker):
    """Reads a file of these bytes; gives the one line of the refusal. Nothing may have run."""

    def read(data):
        path = tmp_path / "network.pkl"
        path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            read_edm_pickle(path)
        assert not marker.exists(), "something ran"
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message

    return read


def raw(*instructions):
    """A hand-written pickle of protocol 4."""
    return b"\x80\x04" + b"".join(instructions) + b"."


def text(value):
    data = str(value).encode()
    return b"X" + struct.pack("<I", len(data)) + data


CALLS = {
    "posix.system": lambda marker: Call(os.system, f"touch {marker}"),
    "os.popen": lambda marker: Call(os.popen, f"touch {marker}; sleep 0.2"),
    "subprocess.call": lambda marker: Call(subprocess.call, ["touch", str(marker)]),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "functools.partial": lambda marker: Call(functools.partial(os.system, f"touch {marker}")),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused_by_its_name(name, refusal, marker):
    data = dumps(checkpoint(tiny_network(), path=CALLS[name](marker)))
    assert f"contains {name}, which" in refusal(data)
    process = loads(data)["dataset_kwargs"]["path"]
    if hasattr(process, "close"):
        process.close()
    assert marker.exists(), "the pickle was not hostile"


def test_source_code_in_the_file_is_not_run(tmp_path, marker):
    source = f"open({str(marker)!r}, 'w').close()"
    ema = tiny_network()
    ema.meta["module_src"] = source
    data = dumps(checkpoint(ema))
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    weights = read_edm_pickle(path)
    assert torch.equal(weights.tensors["model.weight"], torch.arange(6.0).view(2, 3))
    assert not marker.exists(), "something ran"
    loads(data)
    assert marker.exists(), "the pickle was not hostile"


def legacy_file(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zip_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def at_the_place_of_the_storage(value):
    """A storage's file whose fourth pickle, that of the storage, is another one."""
    pieces = io.BytesIO(legacy_file(torch.ones(2).storage()))
    ends = [list(pickletools.genops(pieces))[-1][2] + 1 for _ in range(5)]
    data = pieces.getvalue()
    return data[: ends[2]] + pickle.dumps(value, 2) + data[ends[3] :]


INNER = {
    "legacy file": legacy_file,
    "storage's file": at_the_place_of_the_storage,
    "zip file": zip_file,
    "pickle": functools.partial(pickle.dumps, protocol=4),
}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval"])
def test_the_pickle_inside_of_a_tensor_runs_nothing_either(kind, name, refusal, marker):
    inner = INNER[kind](CALLS[name](marker))
    storage = Call(torch.storage._load_from_bytes, inner)
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})
    data = dumps(checkpoint(tiny_network(), path=tensor))
    message = refusal(data)
    assert "torch.storage._load_from_bytes" in message
    if kind.endswith("'s file") or kind == "legacy file":  # the others are not even looked into
        assert name.removeprefix("builtins.") in message
    with contextlib.suppress(Exception):  # as no storage comes of it
        loads(data)
    assert marker.exists(), "the pickle was not hostile"


def test_a_tensor_file_that_holds_no_storage_is_refused(refusal):
    inner = legacy_file({"weight": torch.ones(2)})
    message = refusal(dumps(Call(torch.storage._load_from_bytes, inner)))
    assert "torch.storage._load_from_bytes" in message
    assert "dict, not a storage" in message


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.array([None, 1], dtype=object), "_core.multiarray._reconstruct"),
        (np.ones(3), "_core.multiarray._reconstruct"),
        (np.dtype(object), "numpy.dtype with arguments that do not fit (O8"),
        (np.dtype([("x", "f8")]), "numpy.dtype with arguments that do not fit (V8"),
        (torch.Size([1]), "torch.Size"),
        (torch.float32, "torch.float32"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (io.BytesIO, "_io.BytesIO"),
    ],
)
def test_what_weights_do_not_need_is_refused_by_its_name(value, name, refusal):
    assert name in refusal(dumps(checkpoint(tiny_network(), path=value)))


def test_dotted_names_reach_nothing_through_a_known_one(refusal):
    dotted = raw(text("collections"), text("OrderedDict.fromkeys.__self__"), b"\x93")
    assert "collections.OrderedDict.fromkeys.__self__" in refusal(dotted)


ORDERED_DICT = b"ccollections\nOrderedDict\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
MODULE_DICT = b"ctorch.nn.modules.container\nModuleDict\n"
PERSISTENT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
DTYPE = b"cnumpy\ndtype\n(" + text("f8") + b"tR"


@pytest.mark.parametrize(
    ("instructions", "named"),
    [
        ([b"cbuiltins\ngetattr\n", b"cposix\n__dict__\n"], "builtins.getattr"),
        ([b"Psome file\n"], "the pickle instruction PERSID"),
        ([text("some file"), b"Q"], "the pickle instruction BINPERSID"),
        ([b"(iposix\nsystem\n"], "the pickle instruction INST"),
        ([b"(", ORDERED_DICT, b"o"], "the pickle instruction OBJ"),
        ([ORDERED_DICT, b")}\x92"], "the pickle instruction NEWOBJ_EX"),
        ([b"}", b")R"], "a call of a dict"),
        ([ORDERED_DICT, b"(N", b"}", text("__class__"), ORDERED_DICT, b"stb"], "a state for coll"),
        ([ORDERED_DICT, b")R", b"}", text("items"), ORDERED_DICT, b"sb"], "a state for a dict"),
        ([ORDERED_DICT, text("x"), b"a"], "APPEND on collections.OrderedDict"),
        ([ORDERED_DICT, text("x"), b"R"], "a call of collections.OrderedDict"),
        ([ORDERED_DICT, b"(", text("x"), b"tR"], "collections.OrderedDict with arguments"),
        ([MODULE_DICT, b")\x81", b"]b"], "a state for a PickledObject"),
        ([PARAMETER, b"(", b"NNNtR"], "torch._utils._rebuild_parameter with arguments"),
        ([PARAMETER, b")R"], "torch._utils._rebuild_parameter with arguments"),
        ([TENSOR, b"(", b"]NNNNNtR"], "torch._utils._rebuild_tensor_v2 with arguments"),
        ([PERSISTENT, b"(", b"}tR"], "torch_utils.persistence._reconstruct_persistent_obj with"),
        ([DTYPE, b"(K\x03", text("|O"), b"tb"], "a numpy.dtype of unknown byte order"),
        ([b"}", b")K\x01s"], "keys that are neither str nor int"),
        ([b"cnumpy.core.multiarray\nscalar\n(", DTYPE, b"C\x02\0\0tR"], "multiarray.scalar with"),
        ([b"c\n\n"], "contains ., which"),
        ([text("a\nb"), text("\x1b[31m"), b"\x93"], "a b.\\x1b[31m"),
    ],
)
def test_instructions_cannot_be_put_together_to_more(instructions, named, refusal):
    assert named in refusal(raw(*instructions))


def test_the_extension_registry_is_no_way_in(refusal, marker):
    copyreg.add_extension("posix", "system", 240)
    try:
        data = raw(b"\x82\xf0(", text(f"touch {marker}"), b"tR")
        assert "the pickle instruction EXT1" in refusal(data)
        pickle.loads(data)
        assert marker.exists(), "the pickle was not hostile"
        marker.unlink()
        # Now that the function is in pickle's cache, too.
        assert "the pickle instruction EXT1" in refusal(data)
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg.clear_extension_cache()


def test_a_tensor_outside_of_its_storage_is_refused(refusal):
    storage = torch.arange(4.0).storage()
    for offset, size, stride in [(1, (4,), (1,)), (0, (3,), (2,)), (-1, (1,), (1,))]:
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
        assert "torch._utils._rebuild_tensor_v2 with arguments" in refusal(dumps(tensor))


def test_another_version_of_the_format_is_refused(refusal):
    ema = tiny_network()
    ema.meta["version"] = 7
    assert "not a persistent class of version 6" in refusal(dumps(checkpoint(ema)))


def test_a_module_that_contains_itself_is_refused(refusal):
    container = torch.nn.ModuleDict()
    container._modules["again"] = container
    ema = Persistent(
        "EDMPrecond", module_state(modules={"model": container}, _init_args=(), _init_kwargs={})
    )
    assert "the module model.again contains itself" in refusal(dumps(checkpoint(ema)))


def test_a_chain_of_modules_beyond_the_recursion_limit_is_read(refusal):
    depth = 3000
    members = [b"}", text("_parameters"), b"}s", text("_buffers"), b"}s", text("_modules"), b"}"]
    chain = [MODULE_DICT, b")\x81", *members, text("x")] * depth + [b"N", b"ssb" * depth]
    meta = [b"}", text("type"), text("class"), b"s", text("version"), b"K\x06s"]
    meta += [text("class_name"), text("EDMPrecond"), b"s", text("state")]
    ema = [PERSISTENT, b"(", *meta, *members, text("x"), *chain, b"ssstR"]
    assert "no tensors in it" in refusal(raw(b"}", text("ema"), *ema, b"s"))


DEEP = 200_000
"""Enough to overflow the stack of a recursion in C, such as the hash of a tuple."""


def inner(*instructions):
    data = b"\x80\x02" + b"".join(instructions) + b"."
    return [struct.pack("<I", len(data)), data]


@pytest.mark.parametrize(
    "instructions",
    [
        [b"]" * 20_000, b"a" * 19_999],
        [b"}", b")", b"\x85" * DEEP, b"Ns"],  # a key, whose hash recurses
        [b"cnumpy\ndtype\n(", b"]" * 20_000, b"a" * 19_999, b"tR"],
        [
            b"ctorch.storage\n_load_from_bytes\n(",
            b"B",
            *inner(b"}", b")", b"\x85" * DEEP, b"Ns"),
            b"tR",
        ],
    ],
    ids=["value", "key", "argument", "key in a storage"],
)
def test_nesting_of_any_depth_ends_in_one_line(instructions, refusal):
    assert refusal(raw(*instructions))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"(lp0\n.", b"<html>not found</html>"])
def test_what_is_no_pickle_is_told(content, refusal):
    assert "not a pickle" in refusal(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="network.pkl: cannot be read"):
        read_edm_pickle(tmp_path / "network.pkl")


def test_a_truncated_file_is_told_wherever_it_ends(refusal):
    data = dumps(checkpoint(tiny_network()))
    for end in range(1, len(data), 7):
        assert "truncated or damaged" in refusal(data[:end])


def test_any_damage_ends_in_weights_or_in_one_line(tmp_path):
    data = dumps(checkpoint(tiny_network()))
    path = tmp_path / "network.pkl"
    numbers = random.Random(0)
    outcomes, lines = set(), set()
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(numbers.choice([1, 3])):
            damaged[numbers.randrange(2, len(data))] = numbers.randrange(256)
        path.write_bytes(damaged)
        try:
            outcomes.add(type(read_edm_pickle(path)))
        except ConfigError as error:
            outcomes.add(ConfigError)
            lines.add(str(error))
    assert outcomes == {Published, ConfigError}
    assert not any("\n" in line for line in lines)
