"""Recipes that are more than data: what would run code or read outside, and what would not end."""

from __future__ import annotations

GLOBAL = "# @package _global_\n"
TARGET = "_target_: os.system, command: touch CANARY"
LINES = TARGET.replace(", ", "\n")

HOSTILE: dict[str, tuple[str, str | bytes, int]] = {
    "target at the top": ("recipe/x.yaml", f"{GLOBAL}{LINES}\n", 2),
    "target in a group": ("trainer/x.yaml", f"steps: 1\n{LINES}\n", 2),
    "target in a free mapping": ("model/x.yaml", f"architecture:\n  a: {{{TARGET}}}\n", 2),
    "target inside a list": ("targets/x.yaml", f"modules:\n  - a\n  - {{{TARGET}}}\n", 3),
    "target in nested lists": ("targets/x.yaml", f"modules: [[[{{{TARGET}}}]]]\n", 1),
    "target in an unknown key": ("trainer/x.yaml", "steps: 1\nlr: {_target_: os.system}\n", 2),
    "target through a merge key": (
        "model/x.yaml",
        f"architecture:\n  a: &g {{{TARGET}}}\n  b: {{<<: *g}}\n",
        2,
    ),
    "target in quotes": ("trainer/x.yaml", '"\\x5ftarget_": os.system\n', 1),
    "target as a complex key": ("trainer/x.yaml", "? _target_\n: os.system\n", 1),
    "partial": ("trainer/x.yaml", "_partial_: true\n", 1),
    "args": ("trainer/x.yaml", "_args_: [x]\n", 1),
    "recursive": ("trainer/x.yaml", "_recursive_: true\n", 1),
    "convert": ("trainer/x.yaml", "_convert_: all\n", 1),
    "hydra node": (
        "recipe/x.yaml",
        f"{GLOBAL}hydra:\n  callbacks:\n    a: {{{TARGET}}}\n",
        2,
    ),
    "hydra node in quotes": ("recipe/x.yaml", f"{GLOBAL}'hydra': {{run: {{dir: /tmp/x}}}}\n", 2),
    "hydra dotted key": ("recipe/x.yaml", f"{GLOBAL}hydra.run.dir: /tmp/x\n", 2),
    "hydra through a merge key": (
        "recipe/x.yaml",
        f"{GLOBAL}<<: {{hydra: {{run: {{dir: x}}}}}}\n",
        2,
    ),
    "hydra header": ("recipe/x.yaml", "# @package hydra\nrun: {dir: /tmp/x}\n", 1),
    "hydra header, dotted": ("recipe/x.yaml", "# @package hydra.callbacks\na: 1\n", 1),
    "hydra header after a first one": (
        "recipe/x.yaml",
        f"{GLOBAL}\n  #   @package   hydra.job\nx: 1\n",
        3,
    ),
    "hydra header without space": ("recipe/x.yaml", "#@package hydra.run\ndir: x\n", 1),
    "hydra header below global": ("recipe/x.yaml", "# @package _global_.hydra.run\ndir: x\n", 1),
    "hydra header, last global wins": (
        "recipe/x.yaml",
        "# @package adapter_global_.hydra.run\ndir: x\n",
        1,
    ),
    "hydra header, hidden global": ("recipe/x.yaml", "# @package a_global_xhydra\nrun: 1\n", 1),
    "hydra header, brackets": ("recipe/x.yaml", "# @package [hydra]\nrun: {dir: x}\n", 1),
    "hydra header after a form feed": (
        "recipe/x.yaml",
        b"# @package _global_\x0c# @package hydra.run\ndir: x\n",
        2,
    ),
    "override of a hydra group": (
        "recipe/x.yaml",
        f"{GLOBAL}defaults:\n  - override /hydra/launcher: joblib\nname: x\n",
        3,
    ),
    "hydra group, absolute": ("recipe/x.yaml", "defaults:\n  - /hydra/callbacks: x\n", 2),
    "hydra group, relative": ("recipe/x.yaml", "defaults:\n  - hydra/callbacks: x\n", 2),
    "hydra group, spaces": ("recipe/x.yaml", "defaults: ['override   /hydra/sweeper: x']\n", 1),
    "hydra as a plain path": ("recipe/x.yaml", "defaults: [/hydra/job_logging/none]\n", 1),
    "hydra group with package": ("recipe/x.yaml", "defaults: [{'hydra@_global_': x}]\n", 1),
    "group into hydra": ("recipe/x.yaml", "defaults: [{'/model@hydra': demo}]\n", 1),
    "group into global hydra": (
        "recipe/x.yaml",
        "defaults: [{'/model@_global_.hydra.run': demo}]\n",
        1,
    ),
    "group into hidden global": (
        "recipe/x.yaml",
        "defaults: [{'/model@a._global_.hydra': demo}]\n",
        1,
    ),
    "path into the parent folder": ("recipe/x.yaml", "defaults: [../../etc/x]\n", 1),
    "choice in the parent folder": ("recipe/x.yaml", "defaults: [{/model: ../hydra/x}]\n", 1),
    "choice list in the parent": ("recipe/x.yaml", "defaults: [{/model: [demo, ../x]}]\n", 1),
    "absolute file": ("recipe/x.yaml", "defaults: [//etc/passwd]\n", 1),
    "absolute choice": ("recipe/x.yaml", "defaults: [{/model: /etc/x}]\n", 1),
    "file scheme": ("recipe/x.yaml", "defaults: ['file:///etc/x']\n", 1),
    "package scheme": ("recipe/x.yaml", "defaults: ['pkg://hydra.conf/x']\n", 1),
    "resolver in defaults": ("recipe/x.yaml", "defaults: [{/model: '${oc.env:X}'}]\n", 1),
    "path built in defaults": ("recipe/x.yaml", "defaults: [{/model: 'a/${data}'}]\n", 1),
    "environment": ("recipe/x.yaml", f"{GLOBAL}name: ${{oc.env:AWS_SECRET_ACCESS_KEY}}\n", 2),
    "environment with default": ("recipe/x.yaml", f"{GLOBAL}name: '${{oc.env:X,y}}'\n", 2),
    "environment in text": ("data/x.yaml", "template: 'a ${oc.env:X} b'\n", 1),
    "environment with spaces": ("data/x.yaml", "template: '${  oc.env : X }'\n", 1),
    "environment in a list": ("targets/x.yaml", "modules: [a, '${oc.env:X}']\n", 1),
    "environment in a free mapping": ("data/x.yaml", "columns: {a: '${oc.env:X}'}\n", 1),
    "decode": ("data/x.yaml", "limit: ${oc.decode:'1'}\n", 1),
    "create": ("data/x.yaml", "columns: \"${oc.create:'{a: b}'}\"\n", 1),
    "keys of a mapping": ("targets/x.yaml", "modules: ${oc.dict.keys:data}\n", 1),
    "hydra resolver": ("data/x.yaml", "template: ${hydra:runtime.cwd}\n", 1),
    "hydra reference": ("data/x.yaml", "template: ${hydra.runtime.cwd}\n", 1),
    "hydra reference, relative": ("data/x.yaml", "template: ${..hydra.job.name}\n", 1),
    "nested reference": ("data/x.yaml", "template: ${${name}}\n", 1),
    "computed reference": ("data/x.yaml", "template: '${a${name}}'\n", 1),
    "unclosed reference": ("data/x.yaml", "template: '${name'\n", 1),
    "python tag": ("data/x.yaml", "path: !!python/object/apply:os.system ['touch CANARY']\n", 1),
    "python path tag": ("data/x.yaml", "path: !!python/object/apply:pathlib.Path [CANARY]\n", 1),
    "python name": ("data/x.yaml", "path: !!python/name:os.system ''\n", 1),
    "python tag on the top": ("data/x.yaml", "!!python/dict\npath: x\n", 1),
    "python tag on a key": ("data/x.yaml", "!!python/name:os.system '': x\n", 1),
    "python tag by handle": (
        "data/x.yaml",
        "%TAG ! tag:yaml.org,2002:python/\n---\npath: !name:os.system ''\n",
        3,
    ),
    "python tag in defaults": ("data/x.yaml", "defaults: [!!python/name:os.system '']\n", 1),
    "custom tag": ("data/x.yaml", "path: !include CANARY\n", 1),
    "binary tag": ("data/x.yaml", "path: !!binary aGk=\n", 1),
}
CALLS = {
    "alias": "logging.os.system, command: touch CANARY",
    "write": "pathlib.Path.write_text, self: CANARY, data: x",
    "copy": "shutil.copy, src: /etc/passwd, dst: CANARY",
    "url": "urllib.request.urlopen, url: 'file:///etc/passwd'",
    "load": "torch.load, f: evil.pt, weights_only: false",
    "method": "hydra.utils.get_method, path: os.system",
    "partial": "os.system, _partial_: true",
    "args": "os.system, _args_: [touch CANARY]",
}
NODES = {
    "logging": "job_logging: {formatters: {f: {'()': os.system, c: touch CANARY}}}",
    "launcher": f"launcher: {{{TARGET}}}",
    "run folder": "run: {dir: CANARY}",
    "search path": "searchpath: ['file:///tmp']",
}
TAGS = {
    "apply": "name: !!python/object/apply:os.system ['touch CANARY']",
    "new": "trainer: !!python/object/new:os.system [touch CANARY]",
    "name": "name: !!python/name:os.system",
    "unknown": "name: !evil x",
}
HOSTILE |= {
    **{
        f"target: {name}": ("recipe/x.yaml", f"{GLOBAL}model: {{_target_: {call}}}\n", 2)
        for name, call in CALLS.items()
    },
    **{
        f"hydra node: {name}": ("recipe/x.yaml", f"{GLOBAL}hydra: {{{node}}}\n", 2)
        for name, node in NODES.items()
    },
    **{f"tag: {name}": ("recipe/x.yaml", f"{GLOBAL}{line}\n", 2) for name, line in TAGS.items()},
    "target in a list of stages": ("recipe/x.yaml", f"{GLOBAL}stages: [{{{TARGET}}}]\n", 2),
    "hydra header with a target": ("recipe/x.yaml", f"# @package hydra.callbacks.c\n{LINES}\n", 1),
}
"""Case to file, content and the line that has to be named."""


def aliases() -> str:
    """Nine lists of nine of the list before: nine to the ninth values."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for one, other in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]")
    return "\n".join(lines) + "\n"


def chain() -> str:
    """Three hundred mappings, each in the next."""
    lines = ["  a0: &a0 {x: 1}", *(f"  a{n}: &a{n} {{x: *a{n - 1}}}" for n in range(1, 300))]
    return "\n".join(["architecture:", *lines, ""])


BOMBS = {
    "chain of aliases": chain(),
    "aliases": "architecture:\n" + "".join(f"  {line}\n" for line in aliases().splitlines()),
    "brackets": "a: " + "[" * 10_000,
    "braces": "a: " + "{a: " * 10_000,
    "dashes": "- " * 10_000,
    "20 MB": "a: " + "x" * (20 << 20),
    "100 MB of nothing": "\0" * (100 << 20),
}
