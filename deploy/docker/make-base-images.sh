#!/usr/bin/env bash
# Makes the images that Dockerfile starts from out of Debian packages and the Rust toolchain of this machine, for where
# no image registry can be reached. Needs root, debootstrap and a Docker engine.
# usage: make-base-images.sh [runtime|build]…      (both unless told)
set -euo pipefail

suite=bookworm
runtime=moerun-runtime-base:$suite
build=moerun-build-base:$suite
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

bootstrap() { # IMAGE PACKAGES
    local root=$folder/root
    rm -rf "$root"
    debootstrap --variant=minbase --include="$2" "$suite" "$root" >"$folder/log" 2>&1 || {
        tail -5 "$folder/log" >&2
        return 1
    }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar -C "$root" -c . | docker import "${@:3}" - "$1" >/dev/null
    echo "$1"
}

for image in "${@:-runtime build}"; do
    for name in $image; do
        case $name in
        runtime) bootstrap "$runtime" ca-certificates ;;
        build)
            bootstrap "$build-packages" ca-certificates,gcc,libc6-dev
            toolchain=$(rustc --print sysroot)
            # The documentation is half of a toolchain.
            tar -C "$toolchain" --exclude=./share --transform='s,^\./,usr/local/,' -c . >"$folder/toolchain.tar"
            container=$(docker create "$build-packages" true)
            docker cp - "$container:/" <"$folder/toolchain.tar" >/dev/null
            docker commit "$container" "$build" >/dev/null
            docker rm "$container" >/dev/null
            docker rmi "$build-packages" >/dev/null
            echo "$build"
            ;;
        *)
            echo "wanted runtime or build, found $name" >&2
            exit 2
            ;;
        esac
    done
done
