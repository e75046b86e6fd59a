"""What the browser computes is what torch computes: decoder, encoder and routing, in few bits and in full precision."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from capsnb import data, load_pretrained, web_export
from capsnb.capsules import squash
from capsnb.evaluation import winner
from capsnb.movable import CHOICES, EXPERTS, models
from capsnb.routing import route_steps
from capsnb.sampling import sample_poses
from capsnb.sparsity import explanation

WEB = Path(web_export.__file__).parent / "web"
IMAGES = slice(100, 124)  # test images that are not among those that ship with the widgets
ROUNDS = 4
NEAR = 0.003  # weights in few bits may take another capsule where two explain an image equally well, up to this


@pytest.fixture(scope="module")
def others(small_networks):
    """Models of the systems that have layers: those that ship, and small ones of other sizes."""
    shipped = {system: CHOICES[system].load(dataset) for _, system, dataset in models() if system != EXPERTS}
    return shipped | {f"small-{name}": moved for name, (_, moved) in small_networks.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory, serve, others):
    """The address of the modules and of every model's weights, small and exact."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "web").symlink_to(WEB)
    (folder / "index.html").write_text("<!doctype html><title>Engine</title>", encoding="utf-8")
    for dataset in web_export.DATASETS:
        for kind in ("small", "exact"):
            web_export.write(load_pretrained(dataset), dataset, folder / kind, exact=kind == "exact")
    for system, model in others.items():
        for kind in ("small", "exact"):
            web_export.write(model, "mnist", folder / kind, system=system, exact=kind == "exact")
    return serve(folder)


@pytest.fixture
def page(window, site):
    page = window()
    page.goto(site)
    return page


@pytest.fixture(params=web_export.DATASETS)
def dataset(request):
    return request.param


def in_browser(page, kind, dataset, body, *arguments):
    """What the JavaScript function ``body`` makes of the loaded model and of the arguments, tensors as flat arrays."""
    given = [[row.flatten().tolist() for row in value] if torch.is_tensor(value) else value for value in arguments]
    script = f"""async ([kind, dataset, given]) => {{
        const {{ loadModel, backend }} = await import("/web/engine.js");
        const model = await loadModel(`/${{kind}}/`, dataset);
        const result = await ({body})(model, ...given, backend);
        return JSON.stringify(result, (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value);
    }}"""
    return json.loads(page.evaluate(script, [kind, dataset, given]))


def decode(page, kind, dataset, capsules):
    body = "(model, codes) => codes.map((code) => model.decode(Float32Array.from(code)))"
    return torch.tensor(in_browser(page, kind, dataset, body, capsules)).view(-1, 1, 28, 28)


def differ(found, expected):
    return (torch.as_tensor(found).flatten() - expected.flatten()).abs().max().item()


def codes(model, dataset, rng):
    """64 codes: real images, single capsules of both domains, two to four capsules at once, all of them, and none."""
    real = model.encode(data.load(dataset, "test", sample=True)[0][IMAGES])
    poses = torch.cat([sample_poses(20, model.poses, domain=name, rng=rng) for name in ("complete", "restricted")])
    on = torch.zeros(len(poses), poses.shape[1], 1)
    for number, count in enumerate([1] * 12 + [2] * 4 + [3, 4, 20, 0] + [1] * 12 + [2] * 4 + [3, 4, 20, 2]):
        on[number, torch.randperm(poses.shape[1], generator=rng)[:count]] = 1
    return torch.cat([real, on * poses])


@pytest.mark.parametrize("kind, tolerance", [("small", 0.01), ("exact", 1e-4)])
def test_the_pictures_of_64_codes_are_those_of_torch(page, rng, dataset, kind, tolerance):
    model = load_pretrained(dataset)
    capsules = codes(model, dataset, rng)
    assert len(capsules) == 64
    assert differ(decode(page, kind, dataset, capsules), model.decode(capsules)) <= tolerance


@pytest.mark.parametrize("kind, tolerance", [("small", 0.01), ("exact", 1e-4)])
def test_the_decoders_of_the_other_systems_make_the_pictures_of_torch(page, rng, others, kind, tolerance):
    """Of real images, the longest capsule alone, and of random poses."""
    for system, model in others.items():
        codes = model.encode(data.load("mnist", "test", sample=True)[0][IMAGES])
        poses = torch.randn(40, *model.poses.mean.shape, generator=rng)
        layers = torch.cat([codes, squash(poses) if model.poses.bounded else poses])
        layers = layers * F.one_hot(winner(layers), layers.shape[1]).unsqueeze(2)
        found = decode(page, kind, f"{system}-mnist", layers)
        assert len(found) == 64 and differ(found, model.decode(layers)) <= tolerance, system


def test_a_slider_that_moves_on_and_on_stays_with_torch(page, rng, dataset):
    model = load_pretrained(dataset)
    steps = torch.cumsum(0.01 * torch.randn(150, 16, generator=rng) * torch.eye(16).repeat(10, 1)[:150], 0)
    capsules = torch.zeros(150, 20, 16)
    capsules[:, 7] = 0.9 * model.poses.mean[7] + steps
    capsules[75:100] = capsules[75:100].roll(1, 1)  # another capsule, then back
    assert differ(decode(page, "exact", dataset, capsules), model.decode(capsules)) <= 1e-4


def test_without_webassembly_plain_javascript_makes_the_same_pictures(window, page, site, rng):
    capsules = codes(load_pretrained("mnist"), "mnist", rng)[20:32]
    asked = "(model, codes, backend) => backend"
    assert in_browser(page, "small", "mnist", asked, []) == "wasm-simd"
    old = window()
    old.add_init_script("delete globalThis.WebAssembly")
    old.goto(site)
    assert in_browser(old, "small", "mnist", asked, []) == "plain"
    assert differ(decode(old, "small", "mnist", capsules), decode(page, "small", "mnist", capsules)) <= 1e-5


@pytest.mark.parametrize("kind, lower, capsule", [("small", 0.02, 0.002), ("exact", 1e-4, 1e-5)])
def test_the_encoder_finds_the_capsules_of_torch(page, dataset, kind, lower, capsule):
    model, images = load_pretrained(dataset), data.load(dataset, "test", sample=True)[0][IMAGES]
    body = """async (model, images) => {
        await model.loadEncoder();
        return images.map((image) => [model.lower(Float32Array.from(image)), model.encode(Float32Array.from(image))]);
    }"""
    found = in_browser(page, kind, dataset, body, images)
    x = model.lower_capsules(images)
    explained, capsules = explanation(x, model.encoder.W), model.encode(images)
    best = explained.topk(2).values
    for number, (found_lower, code) in enumerate(found):
        assert differ(found_lower, x[number]) <= lower
        assert differ(code["explanation"], explained[number]) <= capsule
        if kind == "exact" or best[number, 0] - best[number, 1] > NEAR:
            assert differ(code["capsules"], capsules[number]) <= capsule
    assert (best[:, 0] - best[:, 1] > NEAR).float().mean() > 0.8  # or the loop compared too little


@pytest.mark.parametrize("over", ["upper", "lower"])
@pytest.mark.parametrize("kind, tolerance", [("small", 0.05), ("exact", 1e-4)])  # times the largest value
def test_every_round_of_routing_is_that_of_torch(page, dataset, kind, tolerance, over):
    model, images = load_pretrained(dataset), data.load(dataset, "test", sample=True)[0][IMAGES][:5]
    body = """async (model, images, rounds, over) => {
        await model.loadEncoder();
        return images.map((image) => model.route(model.lower(Float32Array.from(image)), rounds, { over }));
    }"""
    found = in_browser(page, kind, dataset, body, images, ROUNDS, over)
    expected = route_steps(model.lower_capsules(images), model.encoder.W, rounds=ROUNDS, over=over)
    for number, states in enumerate(found):
        assert len(states) == ROUNDS
        for state, wanted in zip(states, expected):
            for name in ("coupling", "z", "agreement"):
                value = getattr(wanted, name)[number]
                assert differ(state[name], value) <= tolerance * value.abs().max(), name


def test_sampled_poses_are_those_of_torch(page, rng):
    model = load_pretrained("mnist")
    body = """(model, count) => ["complete", "restricted"].map((domain) => {
        let seed = 12345;
        const rng = () => (seed = (1103515245 * seed + 12345) % 2 ** 31) / 2 ** 31;
        return Array.from({ length: count }, () => model.samplePose(rng, domain, 3));
    })"""
    complete, restricted = map(torch.tensor, in_browser(page, "small", "mnist", body, 3000))
    lengths = sample_poses(3000, model.poses, domain="complete", rng=rng)[:, 3].norm(dim=1)
    assert abs(complete.norm(dim=1).mean() - lengths.mean()) < 0.003
    assert abs(complete.norm(dim=1).std() - lengths.std()) < 0.003
    assert complete.mean(0).abs().max() < 0.02
    assert ((complete @ model.poses.mean[3] > 0).float().mean() - 0.5).abs() < 0.05
    assert (restricted @ model.poses.mean[3]).min() >= 0
    assert ((complete - restricted).abs().amax(1) < 1e-6).float().mean() > 0.4  # the others are turned round
    assert ((complete + restricted).abs().amax(1) < 1e-6).float().mean() > 0.4


@pytest.mark.parametrize("file", ["mnist.json", "mnist.decoder.bin"])
def test_a_missing_weight_file_is_a_sentence(page, file):
    page.route(f"**/{file}*", lambda route: route.fulfill(status=404))
    assert failure(page).startswith(f"The weights of mnist could not be fetched: {file} is missing")


def test_a_capsule_can_be_decoded_as_soon_as_it_has_arrived(page, site, rng):
    model = load_pretrained("mnist")
    facts = page.request.get(f"{site}small/mnist.json").json()["files"]["decoder"]["tensors"]
    early, late = (int(name.removeprefix("U.")) for name in [*facts][-18:-16])
    capsules = torch.zeros(2, 20, 16)
    capsules[0, early], capsules[1, late] = 0.8 * model.poses.mean[early], 0.8 * model.poses.mean[late]
    end = facts[f"U.{early}"]["offset"] + facts[f"U.{early}"]["bytes"]
    page.route("**/mnist.decoder.bin*", lambda route: route.fulfill(body=route.fetch().body()[:end]))
    picture, too_early, rest, there = page.evaluate(
        """async ([codes, early]) => {
            const { loadModel } = await import("/web/engine.js");
            const model = await loadModel("/small/", "mnist", { first: [early] });
            const why = (action) => action.then(() => "no error", (error) => error.message);
            const there = [...Array(20).keys()].filter((j) => model.has(j));
            const picture = async (code) => Array.from(model.decode(Float32Array.from(code)));
            return [await picture(codes[0]), await why(picture(codes[1])), await why(model.whole), there];
        }""",
        [capsules.flatten(1).tolist(), early],
    )
    assert differ(picture, model.decode(capsules[:1])) <= 0.01
    assert early in there and late not in there and len(there) == 3
    assert too_early == "The weights of mnist have not all arrived yet."
    assert rest.startswith("The weights of mnist arrived incomplete")


def test_a_weight_file_that_breaks_off_is_a_sentence(page):
    page.route("**/mnist.decoder.bin*", lambda route: route.fulfill(body=b"too short"))
    assert failure(page).startswith("The weights of mnist arrived incomplete, 9 of")


def failure(page):
    return page.evaluate("""async () => {
        const { loadModel } = await import("/web/engine.js");
        return loadModel("/small/", "mnist").then(() => "no error", (error) => error.message);
    }""")


def test_progress_counts_every_byte(page):
    body = """async (model) => {
        const seen = [];
        await model.loadEncoder({ onProgress: (progress) => seen.push(progress) });
        return { last: seen.at(-1), bytes: model.manifest.files.encoder.bytes };
    }"""
    found = in_browser(page, "small", "mnist", body)
    assert found["last"] == {"loaded": found["bytes"], "total": found["bytes"]}
