"""Projections for pods: rooflines, links, and the search for what fits, against hand-computed cases."""

import dataclasses

import numpy as np
import pytest
from chips import Chip

from experiments.projecting.links import bandwidth
from experiments.projecting.projection import Projection, project
from experiments.projecting.search import REMATS, largest, search
from q8jax import Report
from q8jax.devices import Device
from q8jax.hlo.collectives import Collective
from q8jax.hlo.costs import Costs
from q8jax.hlo.products import products
from q8jax.hlo.roofline import Roofline, roofline
from q8jax.hlo.text import parse

CHIP = Device(bf16=1000.0, fp8=2000.0, int8=None, bandwidth=10.0, memory=100)


def program(dtype):
    return parse(f"""HloModule step

%fused (a: {dtype}[4,8], b: {dtype}[8,2]) -> f32[4,2] {{
  %a = {dtype}[4,8] parameter(0)
  %b = {dtype}[8,2] parameter(1)
  ROOT %dot = f32[4,2] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (a: {dtype}[4,8], b: {dtype}[8,2]) -> f32[4,2] {{
  %a = {dtype}[4,8] parameter(0)
  %b = {dtype}[8,2] parameter(1)
  %out = f32[4,2] fusion(%a, %b), kind=kOutput, calls=%fused
  ROOT %twice = f32[4,2] add(%out, %out)
}}
""")


@pytest.mark.parametrize(
    ("dtype", "peak", "size"), [("bf16", 1000, 2), ("f8e4m3fn", 2000, 1), ("s8", 1000, 1), ("f32", 500, 4)]
)
def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes(dtype, peak, size):
    module = program(dtype)
    flops, result = 2 * 4 * 8 * 2, 4 * 2 * 4
    first, second = (4 * 8 + 8 * 2) * size + result, 3 * result
    found = roofline(module, products(module, "tpu"), CHIP)
    np.testing.assert_allclose(found.products, flops / peak)
    np.testing.assert_allclose(found.memory, (first + second) / 10)
    np.testing.assert_allclose(found.kernels, max(flops / peak, first / 10) + second / 10)
    fast = dataclasses.replace(CHIP, bandwidth=1e6)
    bound = roofline(module, products(module, "tpu"), fast)
    np.testing.assert_allclose(bound.kernels, flops / peak + second / 1e6)


def tpu(kind, *coords, cut=0):
    return Chip(kind, coords=coords, slice_index=cut)


def gpu(kind, host):
    return Chip(kind, process_index=host)


@pytest.mark.parametrize(
    ("devices", "group", "giga"),
    [
        ([tpu("TPU v5 lite", x, y) for x in range(2) for y in range(2)], (0, 1), 2 * 50),
        ([tpu("TPU v5 lite", x, y) for x in range(2) for y in range(2)], (), 4 * 50),
        ([tpu("TPU v5", x, y, z) for x in range(2) for y in range(2) for z in range(2)], (0, 1, 2, 3), 4 * 100),
        ([tpu("TPU7x", 0, 0, z // 2) for z in range(4)], (), 2 * 100 / 2),
        ([tpu("TPU7x", 0, 0, 0)] * 2, (), 2 * 100 / 2),
        ([tpu("TPU v6 lite", 0, 0, cut=0), tpu("TPU v6 lite", 0, 0, cut=1)], (), 12.5),
        ([gpu("NVIDIA H100 80GB HBM3", 0)] * 8, (), 450),
        ([gpu("NVIDIA H100 80GB HBM3", 0), gpu("NVIDIA H100 80GB HBM3", 1)], (), 50),
    ],
)
def test_a_group_sends_on_the_links_of_its_axes(devices, group, giga):
    assert bandwidth(devices, group or range(len(devices))) == giga * 1e9


def test_nothing_is_known_of_the_links_of_a_cpu():
    assert bandwidth([Chip("cpu")], (0,)) is None


def report(**changes):
    sent = Collective("all-gather", "u8", bytes=10**9, times=1, group=(0, 1))
    whole = Costs(0, 0, 0, 0, 0, None, (sent,))
    given = {"resident_bytes": 10 * 2**30, "roofline": Roofline(0.1, 0.2, 0.25)}
    return Report("TPU v5 lite", (), whole, 0, **{**given, **changes})


def test_a_step_takes_between_all_that_is_sent_hidden_and_nothing_of_it():
    devices = [tpu("TPU v5 lite", x, 0) for x in range(2)]
    found = project(report(), devices, flops=2 * 197e12 * 0.1, tokens=4096)
    assert found.network == pytest.approx(0.01)
    assert (found.fastest, found.slowest) == (0.25, pytest.approx(0.26))
    assert found.utilization == pytest.approx((0.1 / 0.26, 0.1 / 0.25))
    assert found.fits and found.tokens == 2048
    lines = found.lines()
    assert lines["fits"] == "yes, 10.00 of 15.75 GiB, 37 % to spare"
    assert lines["projected step"] == "250.0 to 260.0 ms, MFU 38 % to 40 %"
    full = project(report(resident_bytes=16 * 2**30), devices, flops=1.0, tokens=1)
    assert not full.fits and full.lines()["fits"] == "no, 16.00 of 15.75 GiB"
    assert found.to_json()["mfu"] == list(found.utilization)


def test_nothing_is_projected_for_what_is_not_known():
    assert project(report(roofline=None), [Chip("cpu")] * 2, 1.0, 1) is None
    assert project(report(resident_bytes=None), [tpu("TPU v5 lite", x, 0) for x in range(2)], 1.0, 1) is None


def fitting(resident, available=1000):
    return Projection(resident, available, 1.0, 1.0, 1.0, 0.0, 1.0, tokens=1.0, peak=1.0)


@pytest.mark.parametrize("each", [1, 7, 30, 90, 400, 950, 1001])
@pytest.mark.parametrize("bend", [0, 0.3])
@pytest.mark.parametrize("refuses", [True, False])
def test_the_search_ends_at_the_last_row_that_fits(each, bend, refuses):
    tried = []

    def attempt(rows):
        tried.append(rows)
        resident = int(each * rows * (1 + bend * (rows % 3)))
        return None if refuses and resident > 1000 else fitting(resident)

    found = largest(attempt)
    if each * (1 + bend) > 1000:
        assert found is None and tried == [1]
        return
    rows, projection = found
    assert projection == attempt(rows) and projection.fits
    following = attempt(rows + 1)
    assert following is None or not following.fits
    assert len(tried) <= 12 + 2


def test_every_way_to_rematerialize_is_searched():
    sizes = {(False, "nothing"): 600, (True, "products"): 300, (True, "nothing"): 1001}
    found = list(search(lambda remat, keeps, rows: fitting(sizes[remat, keeps] * rows)))
    assert [(fit.remat, fit.keeps, fit.rows) for fit in found] == [(*REMATS[0], 1), (*REMATS[1], 3)]
    assert found[0].tokens_per_second == 1.0
