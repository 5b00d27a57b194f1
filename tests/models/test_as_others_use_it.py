"""A quantized network in other people's hands: types, samplers and pipelines of diffusers, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

from tdq_exp.quant import bake
from tests.quant.builders import inputs, make_net, make_recipe


@pytest.fixture(scope="module")
def net():
    """A baked network."""
    return bake(make_net(make_recipe("lsq", "temporal")))


@pytest.mark.parametrize(
    "convert",
    [
        lambda net: net.to(torch.float16),
        lambda net: net.half(),
        lambda net: net.double(),
        lambda net: net.bfloat16(),
        lambda net: torch.nn.Sequential(net).half(),
        lambda net: copy.deepcopy(net).half(),
    ],
)
def test_another_floating_type_is_refused_before_anything_is_converted(convert, net):
    before = {name: value.dtype for name, value in net.state_dict().items()}
    with pytest.raises(TypeError, match="computes in float32; for speed use autocast") as caught:
        convert(net)
    assert "\n" not in str(caught.value)
    assert {name: value.dtype for name, value in net.state_dict().items()} == before


def test_what_keeps_float32_still_works_and_half_inputs_are_refused(net):
    assert net.to("cpu").to(torch.float32).float().share_memory() is net
    x, t = inputs()
    with pytest.raises(TypeError, match=r"x_t is torch\.float16: a quantized network"):
        net(x.half(), t)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x, t)[0].shape == x.shape


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_samplers_that_hold_whole_steps_as_floats_work(scheduler, net):
    x, _ = inputs()
    steps = scheduler(timestep_spacing="leading")
    steps.set_timesteps(3)
    with torch.no_grad():
        for t in steps.timesteps:
            assert t.is_floating_point()
            answer = net(steps.scale_model_input(x, t), t, return_dict=False)[0]
            x = steps.step(answer, t, x, return_dict=False)[0]
        assert bool(x.isfinite().all())

        first = inputs()[0]
        assert torch.equal(net(first, torch.tensor(7.0))[0], net(first, 7)[0])


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_pipelines_of_diffusers_take_it(pipeline, scheduler, net):
    pipe = pipeline(unet=net, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape[0] == 2 and images.shape[1:3] == tuple(inputs()[0].shape[2:])


@pytest.mark.parametrize(
    "make", [lambda net: net, copy.deepcopy, bake], ids=["new", "copy", "baked"]
)
def test_a_folder_of_diffusers_would_lose_the_quantizers_and_is_refused(make, tmp_path):
    net = make(make_net(make_recipe("lsq", "temporal")))
    calls = (
        net.save_pretrained,
        DDIMPipeline(unet=net, scheduler=DDIMScheduler()).save_pretrained,
        lambda folder: net.push_to_hub("nobody/net"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="no place for quantizers.*tdq_exp.save") as caught:
            call(tmp_path / "net")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.disable_xformers_memory_efficient_attention(),
        lambda net: net.set_use_npu_flash_attention(False),
        lambda net: net.mid_block.attentions[0].set_processor(AttnProcessor2_0()),
    ],
)
def test_another_processor_of_attention_is_refused(change, net):
    x, t = inputs()
    net = copy.deepcopy(net)
    with torch.no_grad():
        before = net(x, t)[0]
        with pytest.raises(ValueError, match="set_processor: attention is quantized"):
            change(net)
        assert torch.equal(net(x, t)[0], before)


@pytest.mark.parametrize("baked", [False, True])
def test_a_whole_network_is_saved_and_loaded_by_torch(baked, net):
    net = net if baked else make_net(make_recipe("lsq", "temporal"))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)

    x, t = inputs()
    with torch.no_grad():
        assert torch.equal(twin(x, t)[0], net(x, t)[0])
    assert twin.time is not net.time
    with pytest.raises(TypeError):
        twin.half()
