from dataclasses import FrozenInstanceError

import pytest

from derain.errors import DerainError
from derain.metrics import PROTOCOLS, resolve


def test_every_protocol_has_its_name_and_the_first_is_the_default():
    assert [protocol.name for protocol in resolve(list(PROTOCOLS))] == list(PROTOCOLS)
    assert next(iter(PROTOCOLS)) == "matlab-y"
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


def test_ir_sde_is_a_group_of_rgb_and_luma():
    assert [protocol.name for protocol in resolve(["ir-sde"])] == ["ir-sde-rgb", "ir-sde-y"]
    assert [protocol.border for protocol in resolve(["ir-sde"])] == [4, 4]


def test_down_sampling_is_part_of_name_and_definition():
    plain, down = resolve(["prenet", "prenet+down"])
    assert (plain.downsample, down.downsample) == (False, True)
    assert down.name == "prenet+down"
    assert down.definition.startswith(plain.definition)
    assert len(down.definition) > len(plain.definition)
    assert [protocol.name for protocol in resolve(["ir-sde+down"])] == ["ir-sde-rgb+down", "ir-sde-y+down"]


def test_protocols_are_returned_once_in_the_given_order():
    names = [protocol.name for protocol in resolve(["rgb", "ir-sde-y", "ir-sde", "rgb"])]
    assert names == ["rgb", "ir-sde-y", "ir-sde-rgb"]


@pytest.mark.parametrize("names", [["matlab"], ["rgb+up"], ["+down"], [""], []])
def test_unknown_names_are_rejected(names):
    with pytest.raises(DerainError, match=r"matlab-y.*ir-sde") as caught:
        resolve(names)
    assert "\n" not in str(caught.value)


def test_protocols_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        PROTOCOLS["rgb"].border = 2
