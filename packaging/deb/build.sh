#!/bin/sh
# Builds lightllmd_VERSION_ARCH.deb from this checkout.
#
#   packaging/deb/build.sh [--output DIR] [--wheelhouse DIR]
#
# --output      where the package goes; default: dist in the checkout
# --wheelhouse  a directory with the wheels of everything that lightllmd needs. They go into the package, which then
#               installs without a network and is for this machine's architecture and these wheels' Python; without it
#               the package has lightllmd's own wheel and is for all, and pip fetches the rest when it is installed.
#
# Needs dpkg-deb, and a Python ($PYTHON, default python3) that has setuptools, click, msgspec and tomli; where it has
# not, they are installed into a temporary environment. $DEBFULLNAME and $DEBEMAIL name the maintainer. Times in the
# package are $SOURCE_DATE_EPOCH, default the last commit's.
set -eu
umask 022

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH='' cd -- "$here/../.." && pwd)
output=$root/dist
wheelhouse=
python=${PYTHON:-python3}
maintainer="${DEBFULLNAME:-lightllmd developers} <${DEBEMAIL:-lightllmd@localhost}>"

die() {
    echo "build.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --output) [ $# -ge 2 ] || die "--output needs a directory"; output=$2; shift 2 ;;
        --wheelhouse) [ $# -ge 2 ] || die "--wheelhouse needs a directory"; wheelhouse=$2; shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) die "unknown argument: $1" ;;
    esac
done

# Wheels of compiled code are for one Python: dpkg shall refuse another one before pip does.
minor=
if [ -n "$wheelhouse" ]; then
    minor=$(find "$wheelhouse" -maxdepth 1 -name '*.whl' | sed -n 's/.*-cp3[0-9]*-cp3\([0-9]*\)-.*/\1/p' | sort -u)
    case $minor in
        *[!0-9]*) die "$wheelhouse has wheels for more than one Python: $(echo "3.$minor" | tr '\n' ' ')" ;;
    esac
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
tree=$work/tree

# --- the programs ------------------------------------------------------------------------------------------------

# From a copy: setuptools leaves a build folder, whose stale files would go into the next wheel.
mkdir "$work/source"
(cd "$root" && cp -R pyproject.toml README.md LICENSE lightllmd lightllmctl kernels packaging "$work/source")
find "$work/source" -name __pycache__ -prune -exec rm -rf {} +
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
[ -n "$version" ] || die "pyproject.toml names no version"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

if ! "$python" -c 'import click, importlib.metadata, msgspec, tomli
int(importlib.metadata.version("setuptools").split(".")[0]) > 70 or exit(1)' 2> /dev/null; then
    "$python" -m venv "$work/venv"
    python=$work/venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check 'setuptools>=71' click msgspec tomli
fi
wheels=$tree/usr/share/lightllmd/wheels
mkdir -p "$wheels"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$wheels" \
    "$work/source"

architecture=all
depends='python3 (>= 3.11), python3-venv'
if [ -n "$wheelhouse" ]; then
    mkdir "$tree/usr/share/lightllmd/wheelhouse"
    cp "$wheelhouse"/*.whl "$tree/usr/share/lightllmd/wheelhouse/"
    rm -f "$tree/usr/share/lightllmd/wheelhouse"/lightllmd-*.whl
    [ -z "$minor" ] || depends="python3 (>= 3.$minor), python3 (<< 3.$((minor + 1))~), python3-venv"
    architecture=$(dpkg --print-architecture)
    # All that is needed is there, or we hear of it now.
    PIP_CONFIG_FILE=/dev/null "$python" -m pip install --isolated --quiet --disable-pip-version-check --dry-run \
        --ignore-installed --no-index --target "$work/unused" --python-version "3.${minor:-11}" --only-binary :all: \
        --find-links "$tree/usr/share/lightllmd/wheelhouse" "$wheels"/lightllmd-*.whl
fi
(cd "$tree/usr/share/lightllmd" && find . -name '*.whl' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum > wheels.sha256)

mkdir -p "$tree/usr/bin"
ln -s ../lib/lightllmd/venv/bin/lightllmd ../lib/lightllmd/venv/bin/lightllmctl "$tree/usr/bin"

# --- what stands around them ---------------------------------------------------------------------------------------

put() { # FILE DIRECTORY [NAME]
    mkdir -p "$tree/$2"
    install -m 644 "$1" "$tree/$2/${3:-$(basename "$1")}"
}

units=$root/packaging/systemd
put "$units/lightllmd.service" usr/lib/systemd/system
put "$units/lightllmd.socket" usr/lib/systemd/system
put "$units/sysusers.d/lightllmd.conf" usr/lib/sysusers.d
put "$units/tmpfiles.d/lightllmd.conf" usr/lib/tmpfiles.d

{
    echo '#:schema file:///usr/share/lightllmd/lightllmd.schema.json'
    cat "$here/lightllmd.toml.head"
    sed 1d "$root/etc/lightllmd.toml"
} > "$work/lightllmd.toml"
put "$work/lightllmd.toml" etc/lightllmd
put "$root/etc/lightllmd.schema.json" usr/share/lightllmd

completions=$root/packaging/completions
put "$completions/lightllmctl.bash" usr/share/bash-completion/completions lightllmctl
put "$completions/_lightllmctl" usr/share/zsh/vendor-completions
put "$completions/lightllmctl.fish" usr/share/fish/vendor_completions.d

PYTHONPATH=$work/source "$python" "$work/source/packaging/man/build.py" "$work/man"
for page in "$work"/man/*; do
    gzip -9n "$page"
    put "$page.gz" "usr/share/man/man${page##*.}"
done

doc=usr/share/doc/lightllmd
put "$here/copyright" $doc
put "$here/README.Debian" $doc
put "$root/etc/demo.toml" $doc/examples
{
    echo "lightllmd ($version) unstable; urgency=medium"
    echo
    echo "  * Built from the commit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo 'of a source archive')."
    echo
    echo " -- $maintainer  $(date -u -R -d "@$SOURCE_DATE_EPOCH")"
} | gzip -9n > "$work/changelog.gz"
put "$work/changelog.gz" $doc

# --- the package -----------------------------------------------------------------------------------------------------

mkdir "$tree/DEBIAN"
cat > "$tree/DEBIAN/control" <<CONTROL
Package: lightllmd
Version: $version
Architecture: $architecture
Maintainer: $maintainer
Installed-Size: $(du -sk --exclude=DEBIAN "$tree" | cut -f 1)
Depends: $depends, init-system-helpers (>= 1.54~), passwd, systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles
Recommends: ca-certificates, gcc, libc6-dev, python3-dev
Section: net
Priority: optional
Description: supervised daemon that serves large language models
 lightllmd reads one TOML file, keeps a large language model serving over HTTP
 (LightLLM's native API and OpenAI's), restarts what dies, swaps models, and
 loses no request that it accepted. lightllmctl asks and commands it.
 .
 Its Python packages live in an environment of their own, which is made when
 this package is configured. README.Debian tells from what.
CONTROL
echo /etc/lightllmd/lightllmd.toml > "$tree/DEBIAN/conffiles"
install -m 644 "$here/triggers" "$tree/DEBIAN/triggers"
install -m 755 "$here/postinst" "$here/prerm" "$here/postrm" "$tree/DEBIAN/"
(cd "$tree" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) > "$tree/DEBIAN/md5sums"

mkdir -p "$output"
package=$output/lightllmd_${version}_$architecture.deb
# Wheels are compressed already.
dpkg-deb --root-owner-group -Z"$([ -n "$wheelhouse" ] && echo none || echo xz)" --build "$tree" "$package" > /dev/null
echo "$package"
