#!/usr/bin/env bash
# Makes this machine a node: builds, installs, gets the cluster key, starts the daemon.
#
#   MIGD_ADDRESS       IP:PORT where this node listens (required)
#   MIGD_SEED          IP:PORT of a member to join; its own address on the first node
#   MIGD_SOURCE        the source tree (default: the folder above this script)
#   MIGD_KEY_EXCHANGE  a folder in which the key lies, or in which the first node leaves it; without it, copy
#                      /etc/migd/cluster.key from a member by a safe way before running this
set -euo pipefail
: "${MIGD_ADDRESS:?IP:PORT where this node listens}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_dir=${MIGD_SOURCE:-$(dirname "$here")}
seed=${MIGD_SEED:-$MIGD_ADDRESS}
exchange=${MIGD_KEY_EXCHANGE:-}
programs=(migd mosrun migrate mosps mosctl mosmon moslab migckpt)

if [[ $EUID -ne 0 ]]; then
  echo "provision.sh: run it as root" >&2
  exit 1
fi

if command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq gcc libc6-dev iproute2 curl ca-certificates >/dev/null
fi
if ! command -v cargo >/dev/null && [[ -x $HOME/.cargo/bin/cargo ]]; then
  PATH=$HOME/.cargo/bin:$PATH
fi
if ! command -v cargo >/dev/null; then
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
  PATH=$HOME/.cargo/bin:$PATH
fi

(cd "$source_dir" && cargo build --release --locked --bins)
for program in "${programs[@]}"; do
  install -m 755 "$source_dir/target/release/$program" "/usr/local/bin/$program"
done

install -d -m 755 /etc/migd
if [[ ! -f /etc/migd/cluster.key ]]; then
  if [[ -n $exchange && -f $exchange/cluster.key ]]; then
    mosctl cluster join "$seed" --key "$exchange/cluster.key"
  elif [[ $seed == "$MIGD_ADDRESS" ]]; then
    mosctl cluster init
    if [[ -n $exchange ]]; then
      install -m 600 /etc/migd/cluster.key "$exchange/cluster.key"
    fi
  else
    echo "provision.sh: no cluster key: copy /etc/migd/cluster.key from $seed, then run this again" >&2
    exit 1
  fi
fi

# TIDs that guests get away from home must be free at home: room for them.
echo 'kernel.pid_max = 4194304' >/etc/sysctl.d/60-migd.conf
sysctl -q -p /etc/sysctl.d/60-migd.conf || true

join=
if [[ $seed != "$MIGD_ADDRESS" ]]; then
  join="--join $seed"
fi
install -m 644 "$source_dir/vagrant/migd.service" /etc/systemd/system/migd.service
printf 'MIGD_OPTIONS=--listen %s %s\n' "$MIGD_ADDRESS" "$join" >/etc/default/migd
systemctl daemon-reload
systemctl enable --now migd
mosctl status
