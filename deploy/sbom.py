#!/usr/bin/env python3
"""Writes what Moerun is made of as a CycloneDX document, from Cargo.lock and cargo's own metadata.

usage: sbom.py OUT.json          writes it
       sbom.py --check OUT.json  checks that it is valid CycloneDX and says of every package of Cargo.lock what that says
                                 (wants PyPI cyclonedx-python-lib[json-validation])

The same tree gives the same bytes. Packages that the released binary holds have the scope "required", those that only
build or test it "excluded".
"""

import json
import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = "moerun"


def metadata():
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def locked_packages():
    """(name, version) to checksum, or to None for packages of this repository."""
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(package["name"], package["version"]): package.get("checksum") for package in lock["package"]}


def purl(name, version):
    return f"pkg:cargo/{name}@{version}"


def in_binary(meta):
    """Ids of packages that are linked into the binary: reached from it without dev- and build-dependencies."""
    nodes = {node["id"]: node for node in meta["resolve"]["nodes"]}
    todo = [package["id"] for package in meta["packages"] if package["name"] == BINARY]
    seen = set()
    while todo:
        package = todo.pop()
        if package not in seen:
            seen.add(package)
            for dependency in nodes[package]["deps"]:
                if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                    todo.append(dependency["pkg"])
    return seen


def licence(expression):
    # Before SPDX expressions, cargo knew a slash as "or".
    return [{"expression": expression.replace("/", " OR ")}] if expression else []


def component(name, version, checksum, package, required):
    entry = {
        "type": "library",
        "bom-ref": purl(name, version),
        "name": name,
        "version": version,
        "scope": "required" if required else "excluded",
        "purl": purl(name, version),
    }
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package and licence(package["license"]):
        entry["licenses"] = licence(package["license"])
    return entry


def document():
    meta = metadata()
    packages = {(package["name"], package["version"]): package for package in meta["packages"]}
    by_id = {package["id"]: package for package in meta["packages"]}
    linked = in_binary(meta)
    main = next(package for package in meta["packages"] if package["name"] == BINARY)
    components = []
    for (name, version), checksum in sorted(locked_packages().items()):
        package = packages.get((name, version))
        if name != BINARY:
            required = package is not None and package["id"] in linked
            components.append(component(name, version, checksum, package, required))
    ref = lambda package: purl(package["name"], package["version"])
    dependencies = [
        {"ref": ref(by_id[node["id"]]), "dependsOn": sorted({ref(by_id[id]) for id in node["dependencies"]})}
        for node in meta["resolve"]["nodes"]
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": ref(main),
                "name": BINARY,
                "version": main["version"],
                "licenses": licence(main["license"]),
                "purl": ref(main),
            },
        },
        "components": components,
        "dependencies": sorted(dependencies, key=lambda entry: entry["ref"]),
    }


def check(path):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = pathlib.Path(path).read_text()
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, f"{path}: not valid CycloneDX: {problem}"
    bom = json.loads(text)
    found = {
        (entry["name"], entry["version"]): entry.get("hashes", [{}])[0].get("content")
        for entry in [*bom["components"], bom["metadata"]["component"]]
    }
    wanted = locked_packages()
    differs = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key, "") != found.get(key, ""))
    assert not differs, f"{path}: differs from Cargo.lock in {differs}"
    unlicensed = sorted(entry["name"] for entry in bom["components"] if entry["scope"] == "required" and "licenses" not in entry)
    assert not unlicensed, f"{path}: no licence of {unlicensed}"
    required = sum(entry["scope"] == "required" for entry in bom["components"])
    print(f"{path}: {len(found)} packages, {required} of them in the binary")


def main():
    match sys.argv[1:]:
        case ["--check", path]:
            check(path)
        case [path] if not path.startswith("-"):
            pathlib.Path(path).write_text(json.dumps(document(), indent=2) + "\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
