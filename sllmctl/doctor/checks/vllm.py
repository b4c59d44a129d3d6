"""VLLM: vLLM, vllm-ascend, and the patch of sllm-store."""

from __future__ import annotations

import re

from sllmctl.doctor.cann_files import key_values
from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    dist,
    env,
    fail,
    file,
    info,
    ok,
    say,
    skip,
    warn,
    worst,
)
from sllmctl.doctor.checks.packages import torch_command
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.versions import cann_base, cann_key, public, release

# Names that images and packages are built for; the first word that is in a text counts.
_SOC = (("910_93", "A3"), ("-a3-", "A3"), ("910b", "A2"), ("310p", "310P"), ("950", "A5"))
# A generation, and the SOC_VERSION that builds for it.
_SOC_VERSION = {
    "A2": "ascend910b1", "A3": "ascend910_9391", "310P": "ascend310p1", "A5": "ascend950dt_9582",
}  # fmt: skip
# Older releases wrote the chip (ASCEND910B1), newer ones its generation (A2, _310P).
_DEVICE = re.compile(r"__(?:device_type|soc_version)__\s*=\s*['\"]_?(\w+)['\"]")
# What the patches of sllm-store put into vLLM 0.7: file to token, relative to site-packages.
_SAVE = "save_serverless_llm_state"
PATCHED = {
    "vllm/config.py": 'SERVERLESS_LLM = "serverless_llm"',
    "vllm/model_executor/model_loader/loader.py": "class ServerlessLLMLoader",
    "vllm/executor/gpu_executor.py": _SAVE,
    "vllm/executor/distributed_gpu_executor.py": _SAVE,
    "vllm/worker/worker.py": _SAVE,
    "vllm/worker/model_runner.py": _SAVE,
    "vllm_ascend/worker/worker.py": _SAVE,
    "vllm_ascend/worker/model_runner.py": _SAVE,
}


def vllm_command(version: str) -> str:
    """The command that installs vLLM without the torch for CUDA that it asks for."""
    return f"VLLM_TARGET_DEVICE=empty pip install --no-deps vllm=={version}"


@check(
    "VLLM001",
    title="vllm is the one for vllm-ascend",
    why="each release of vllm-ascend is made for one release of vLLM",
    looks_at="the versions of vllm and vllm-ascend, and the table of vllm-ascend",
    profiles="vllm",
)
def pair(m: Machine) -> Finding:
    ascend, here = m.dists.version("vllm-ascend"), m.dists.version("vllm")
    if not ascend:
        return skip(say("vllm-ascend is not installed"))
    seen = (dist("vllm", here or "missing"), dist("vllm-ascend", ascend))
    row = m.tables.for_vllm_ascend(ascend)
    wanted = row.vllm[-1] if row else ""
    fix = vllm_command(wanted or public(ascend))
    if not here:
        return fail(say("vllm-ascend is installed without vllm"), *seen, fix=fix)
    if ("dev" in here or not release(here)) and not m.env.get("VLLM_VERSION"):
        return warn(
            say("vllm {version} is a development build", version=here),
            *seen,
            fix=f"export VLLM_VERSION={wanted or public(ascend)}",
        )
    if row is None:
        return info(
            say("the tables ({date}) do not know vllm-ascend {version}",
                date=m.tables.date, version=ascend),
            *seen,
        ) if release(ascend)[:2] != release(here)[:2] else ok(
            say("vllm {vllm} and vllm-ascend {ascend}", vllm=here, ascend=ascend), *seen
        )  # fmt: skip
    said, fitting = m.env.get("VLLM_VERSION"), [release(v)[:3] for v in row.vllm]
    if release(said or here)[:3] in fitting:
        return ok(say("vllm {vllm} and vllm-ascend {ascend}", vllm=here, ascend=ascend), *seen)
    if said and release(here)[:3] in fitting:
        return fail(
            say("VLLM_VERSION says {said}, which vllm-ascend {ascend} is not made for",
                said=said, ascend=ascend),
            env("VLLM_VERSION", said),
            *seen,
            fix=f"export VLLM_VERSION={wanted}",
        )  # fmt: skip
    return fail(
        say("vllm-ascend {ascend} is made for vllm {wanted}, not {vllm}",
            ascend=ascend, wanted=wanted, vllm=here),
        *seen,
        fix=fix,
    )  # fmt: skip


@check(
    "VLLM002",
    title="CANN, torch and torch_npu are those of vllm-ascend",
    why="vllm-ascend is tested with one row of versions",
    looks_at="the row of the installed vllm-ascend: CANN, torch, torch_npu",
    profiles="vllm",
    needs=("VLLM001",),
)
def row(m: Machine) -> Finding:
    ascend = m.dists.version("vllm-ascend")
    known = m.tables.for_vllm_ascend(ascend)
    if known is None:
        return info(
            say("the tables ({date}) do not know vllm-ascend {version}",
                date=m.tables.date, version=ascend),
            dist("vllm-ascend", ascend),
        )  # fmt: skip
    found: list[Finding | None] = []
    if m.cann is not None and (cann := cann_base(m.cann.version)) != known.cann:
        here, there = cann_key(cann), cann_key(known.cann)
        close = here and there and here[:3] == there[:3]
        found.append(
            (info if close or not m.tables.may_know(cann) else fail)(
                say("vllm-ascend {ascend} was tested with CANN {wanted}, here is {cann}",
                    ascend=ascend, wanted=known.cann, cann=cann),
                file(m.cann.source, m.cann.version),
                fix=f"./Ascend-cann-toolkit_{known.cann}_linux-{m.arch}.run --install",
            )
        )  # fmt: skip
    for name, wanted in (("torch", known.torch), ("torch-npu", known.torch_npu)):
        installed = public(m.dists.version(name))
        if not installed or installed == public(wanted):
            continue
        same = release(installed)[:3] == release(wanted)[:3]
        found.append(
            (info if same else fail)(
                say("vllm-ascend {ascend} was tested with {name} {wanted}, here is {here}",
                    ascend=ascend, name=name, wanted=public(wanted), here=installed),
                dist(name, installed),
                fix=torch_command(known.torch, public(known.torch_npu), m.arch)
                if name == "torch"
                else f"pip install {name}=={public(wanted)}",
            )
        )  # fmt: skip
    return worst(found, ok(say("all versions are those of vllm-ascend {version}", version=ascend)))


@check(
    "VLLM003",
    title="vLLM finds the plugin of vllm-ascend",
    why="without it: Failed to infer device type",
    looks_at="the entry point `ascend` in vllm.platform_plugins, and VLLM_PLUGINS",
    profiles="vllm",
    needs=("VLLM001",),
)
def plugin(m: Machine) -> Finding:
    points = m.dists.entry_points("vllm-ascend", "vllm.platform_plugins")
    if "ascend" not in points:
        return fail(
            say("vllm-ascend registers no plugin with vLLM"),
            dist("vllm-ascend", m.dists.version("vllm-ascend")),
            fix="pip install --force-reinstall --no-deps "
            f"vllm-ascend=={public(m.dists.version('vllm-ascend'))}",
        )
    chosen = m.env.get("VLLM_PLUGINS")
    if chosen is not None and "ascend" not in [name.strip() for name in chosen.split(",")]:
        return fail(
            say("VLLM_PLUGINS leaves out ascend"),
            env("VLLM_PLUGINS", chosen),
            fix="unset VLLM_PLUGINS",
        )
    return ok(say("vLLM finds the plugin"))


@check(
    "VLLM004",
    title="the native part of vllm-ascend is here, for this chip",
    why="a build without it, or for another generation, fails at the first operator",
    looks_at="*_C*.so, libvllm_ascend_kernels.so and _cann_ops_custom in the package, and "
    "__device_type__ or __soc_version__ in _build_info.py",
    profiles="vllm",
    needs=("VLLM001",),
)
def native(m: Machine) -> Finding:
    package = m.dists.package("vllm-ascend", "vllm_ascend")
    if package is None:
        return skip(say("the package vllm_ascend was not found"))
    soc = _SOC_VERSION.get(m.generation, "<chip>")
    fix = f"SOC_VERSION={soc} pip install --no-build-isolation -e .  # in the source of vllm-ascend"
    text = m.probe.read_text(f"{package}/_build_info.py") or ""
    match = _DEVICE.search(text)
    named = match[1] if match else ""
    plain = named if named in _SOC_VERSION else ""
    built = next((kind for word, kind in _SOC if word in named.lower()), plain)
    if built and m.generation and built != m.generation:
        return fail(
            say("vllm-ascend was built for {built}, the cards are {here}",
                built=built, here=m.generation),
            file(f"{package}/_build_info.py", named),
            fix=fix,
        )  # fmt: skip
    parts = [
        *m.probe.glob(f"{package}/*_C*.so"),
        *m.probe.glob(f"{package}/lib*.so"),
        *m.probe.glob(f"{package}/_cann_ops_custom"),
    ]
    if not parts:
        return fail(say("vllm-ascend has no native part"), file(package, "no *_C*.so"), fix=fix)
    return ok(say("the native part of vllm-ascend is here"), file(parts[0]))


@check(
    "VLLM005",
    title="the container's image is made for these cards",
    why="images of vllm-ascend exist for A2 and, with -a3 in their tag, for A3",
    looks_at="SOC_VERSION, which the images set, and the name of CANN's operator package, against "
    "the cards",
    severity=Status.WARN,
    profiles="vllm",
    needs=("VLLM001",),
)
def image(m: Machine) -> Finding:
    soc = m.env.get("SOC_VERSION", "")
    path = f"{m.cann.path}/{m.arch}-linux/ascend_ops_install.info" if m.cann else ""
    package = key_values(m.probe.read_text(path)).get("package_name", "") if path else ""
    said = [
        (generation, seen)
        for text, seen in ((soc, env("SOC_VERSION", soc)), (package, file(path, package)))
        for word, generation in _SOC
        if word in text.lower()
    ]
    if not said and not m.in_container:
        return skip(say("this is not a container"))
    if not said or m.generation not in ("A2", "A3"):
        return skip(say("nothing here says which cards the image is made for"))
    wrong = [(generation, seen) for generation, seen in said if generation != m.generation]
    if not wrong:
        return ok(say("the image is made for {chip}", chip=m.generation), said[0][1])
    return warn(
        say("the image is made for {built}, the cards are {here}",
            built=wrong[0][0], here=m.generation),
        *(seen for _, seen in wrong),
        advice=say("take the image with -a3 in its tag")
        if m.generation == "A3"
        else say("take the image without -a3 in its tag"),
    )  # fmt: skip


@check(
    "VLLM006",
    title="the patch of sllm-store is applied whole, or not at all",
    why="the patch's own check calls any failed try `already applied`",
    looks_at="the words that the two patches add to vllm 0.7 and vllm-ascend; .rej files",
    profiles="vllm",
    needs=("VLLM001",),
)
def patch(m: Machine) -> Finding:
    found = m.dists.get("vllm")
    if found is None or release(found.version)[:2] != (0, 7):
        return skip(say("there is no patch for this vLLM"))
    there = [n for n, word in PATCHED.items()
             if word in (m.probe.read_text(f"{found.site}/{n}", 1 << 20) or "")]  # fmt: skip
    missing = [name for name in PATCHED if name not in there]
    if there and missing:
        return fail(
            say("the patch of sllm-store is applied only in part: {count} of {total} files",
                count=len(there), total=len(PATCHED)),
            *(file(f"{found.site}/{name}", "not patched") for name in missing[:4]),
            fix=f"cd {found.site} && patch -p1 --dry-run < sllm_load_npu.patch  "
            "# then without --dry-run, and vllm_ascend.patch alike",
        )  # fmt: skip
    rejected = [p for n in PATCHED if m.probe.exists(p := f"{found.site}/{n}.rej")]
    if rejected:
        return warn(
            say("parts of a patch were rejected: {name}", name=rejected[0]),
            *(file(name) for name in rejected),
            fix=f"rm {' '.join(rejected)}  # after a look into them",
        )
    return ok(
        say("the patch of sllm-store is applied")
        if there
        else say("the patch of sllm-store is not applied")
    )
