#!/bin/sh
# Installs what the tests and the demo need beyond Go, on Debian 12 as root:
# Debian's packages, and engines built from the Go module proxy; with the
# argument "packages" the former only, which the demo does with. Says nothing and
# changes nothing where all of it is there.
set -eu

packages='ca-certificates curl iproute2 nginx-light containerd docker.io docker-registry podman skopeo debootstrap'
crane=v0.22.1
containerd=v2.4.2
bin="${XDG_CACHE_HOME:-$HOME/.cache}/damselfly/bin"

missing=
for package in $packages; do
	dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done

if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "install.sh: needs root to install$missing" >&2
		exit 1
	fi
	# No package may start its service: the policy says no, and goes when we go.
	policy=/usr/sbin/policy-rc.d
	mark='# for the time of an installation by damselfly'
	if [ ! -e "$policy" ] || grep -qxF "$mark" "$policy"; then
		trap 'rm -f "$policy"' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$policy"
		chmod 755 "$policy"
	fi
	echo "installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	log="$(mktemp)"
	# shellcheck disable=SC2086 # a list of words
	if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		rm -f "$log"
		exit 1
	fi
	rm -f "$log"
	# Nor at the next boot.
	if [ -d /run/systemd/system ]; then
		for package in $missing; do
			case "$package" in
			docker.io) systemctl --quiet disable docker.service docker.socket ;;
			podman) systemctl --quiet disable podman.service podman.socket podman-restart.service podman-auto-update.timer ;;
			docker-registry | containerd | nginx) systemctl --quiet disable "$package.service" ;;
			esac
		done
	fi
fi

[ "${1:-}" = packages ] && exit

# build VERSION MODULE PACKAGE...: builds the commands, once for each version,
# and makes that version the one in use. Without cgo, so that no C library or
# compiler is asked for.
build() {
	version=$1 module=$2
	shift 2
	for command; do
		name="${command##*/}"
		if [ -x "$bin/$version/$name" ]; then
			ln -sfn "$version/$name" "$bin/$name"
			continue
		fi
		echo "building $name $version"
		mkdir -p "$bin"
		work="$(mktemp -d "$bin/building.XXXXXX")"
		if ! GOFLAGS='' GOBIN="$work" CGO_ENABLED=0 go install -tags 'no_btrfs no_cri no_devmapper no_zfs' \
			"$module$command@$version" >"$work/log" 2>&1; then
			grep -v '^go: downloading' "$work/log" >&2
			rm -rf "$work"
			exit 1
		fi
		mkdir -p "$bin/$version"
		mv "$work/$name" "$bin/$version/$name"
		ln -sfn "$version/$name" "$bin/$name"
		rm -rf "$work"
	done
}

# What stands in tools/clients/go.mod, which pins it.
clients="$(cd "$(dirname "$0")/../tools/clients" && pwd)"
sum="clients-$(cksum <"$clients/go.mod" | cut -d ' ' -f 1)"
for command in oras.land/oras/cmd/oras github.com/regclient/regclient/cmd/regctl; do
	name="${command##*/}"
	if [ ! -x "$bin/$sum/$name" ]; then
		echo "building $name"
		mkdir -p "$bin/$sum"
		log="$(mktemp)"
		if ! GOFLAGS='' CGO_ENABLED=0 go build -C "$clients" -o "$bin/$sum/$name.new" "$command" >"$log" 2>&1; then
			grep -v '^go: downloading' "$log" >&2
			rm -f "$log"
			exit 1
		fi
		rm -f "$log"
		mv "$bin/$sum/$name.new" "$bin/$sum/$name"
	fi
	ln -sfn "$sum/$name" "$bin/$name"
done

build "$crane" github.com/google/go-containerregistry /cmd/crane
build "$containerd" github.com/containerd/containerd/v2 /cmd/containerd /cmd/ctr
