#!/usr/bin/env bash
# Fetches published files, by their names in scripts/downloads.tsv, to the places where configs and recipes look.
#
#   bash scripts/download.sh NAME...     cifar10_uvit_small, fid_stats_cifar10, ...; without a name: lists them
#
# A stopped download goes on where it was. A file stands under its name only once it is as long as the server said and
# has the checksum that its publisher names, if any. Where a host does not hand the file out (a shared OneDrive folder,
# Google Drive's quota), the link and the place are told, and the status is 1.
#
#   DATA=data                        the folder of all places
#   TABLE=scripts/downloads.tsv      another list
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-data} table=${TABLE:-scripts/downloads.tsv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rows() { grep -v '^#' "$table" | grep .; }
refuse() { # WHY: the file must be fetched by hand
    echo "error: $name: $1; fetch it by hand: $link${inside:+ ($inside)}; its place is $target" >&2
    return 1
}
curl() { command curl --silent --show-error --location --cookie "$work/cookies" --cookie-jar "$work/cookies" "$@"; }
progress=()
[ ! -t 2 ] || progress=(--no-silent --progress-bar)

# The server's answer to a request of the first bytes: status, type and size of the file ("" if not told); the bytes
# themselves go to $work/start. A server that cannot send parts would send all: head stops it.
ask() { # URL
    { curl --range 0-65535 --dump-header "$work/headers" "$1" 2>"$work/why" || true; } | head -c 65536 >"$work/start"
    [ -s "$work/headers" ] || { refuse "$(head -n 1 "$work/why")"; return; }
    # after a redirection the last answer counts
    read -r status type size < <(tr -d '\r' <"$work/headers" | awk '
        /^HTTP/ { status = $2; type = size = "-" }
        tolower($1) == "content-type:" { type = $2 }
        tolower($1) == "content-length:" && status == 200 { size = $2 }
        tolower($1) == "content-range:" { sub(/.*\//, ""); size = $0 }
        END { print status, type, size }')
    [[ $status == 20[06] ]] || refuse "the server answers with status $status"
}
is_page() { [[ $type == text/html* ]] || head -c 512 "$work/start" | grep -qiE '^[[:space:]]*<(!doctype|html)'; }

# Google Drive answers for large files with a form ("cannot scan for viruses"): the address that its button opens.
confirmed() {
    local page action fields
    page=$(tr '\n' ' ' <"$work/start")
    action=$(grep -oE 'id="download-form" action="[^"]*' <<<"$page" | cut -d '"' -f 4) || return
    fields=$(grep -oE '<input type="hidden" name="[^"]*" value="[^"]*' <<<"$page" |
        sed -E 's/.*name="([^"]*)" value="(.*)/\1=\2/' | paste -sd '&')
    sed 's/&amp;/\&/g' <<<"$action?$fields"
}

# The id of PATH (folders and a file, joined by /) in a shared Google Drive folder, from its list view.
find_in_folder() { # HOST FOLDER_ID PATH
    local entries id=$2 part
    for part in ${3//\// }; do
        curl --fail --output "$work/list" "$1/embeddedfolderview?id=$id" 2>"$work/why" || return
        entries=$(tr '\n' ' ' <"$work/list" | sed 's/id="entry-/\n&/g')
        id=$(grep -F "flip-entry-title\">$part<" <<<"$entries" | head -n 1 |
            grep -oE '/(file/d|folders)/[A-Za-z0-9_-]+' | head -n 1 | grep -oE '[^/]+$') || return
    done
    echo "$id"
}

address() { # the address that hands the file of $link out
    local host id
    case $link in
        *sharepoint.com/:f:*) refuse "a shared OneDrive folder opens in a browser only" ;;
        */drive/folders/*)
            host=${link%%/drive/folders/*}
            id=$(find_in_folder "$host" "${link##*/drive/folders/}" "$inside") ||
                { refuse "not found in the shared folder"; return; }
            echo "$host/uc?export=download&id=$id" ;;
        */file/d/*/view) id=${link%/view} && echo "${link%%/file/d/*}/uc?export=download&id=${id##*/}" ;;
        *) echo "$link" ;;
    esac
}

has_checksum() { # FILE
    case $check in
        "") return ;;
        md5:*) [ "$(md5sum <"$1" | cut -d ' ' -f 1)" = "${check#md5:}" ] ;;
        sha256:*) [[ $(sha256sum <"$1") == "${check#sha256:}"* ]] ;;
    esac
}

fetch() { # the file of $name, $target, $link, $inside, $check
    local url status type size part=$target.part held=0
    if [ -f "$target" ]; then
        echo "$target is there"
        return
    fi
    url=$(address) || return
    ask "$url" || return
    if is_page && url=$(confirmed); then
        ask "$url" || return
    fi
    if is_page; then
        refuse "the server sends a page instead: $(grep -oiE '<title>[^<]*' "$work/start" | head -n 1 | cut -c 8-)"
        return
    fi

    mkdir -p "$(dirname "$target")"
    [ ! -f "$part" ] || held=$(wc -c <"$part")
    if [ "$status" != 206 ] || { [ "$size" != - ] && ((held > size)); }; then # no parts, or not of this file
        rm -f "$part"
        held=0
    fi
    [ "$size" = - ] || echo "$target: $held of $size bytes are here"
    if [ "$size" = - ] || ((held < size)); then
        curl --fail "${progress[@]}" --retry 3 --continue-at - --output "$part" "$url" ||
            { echo "error: $name: the download stopped; the same command goes on with it" >&2; return 1; }
    fi
    held=$(wc -c <"$part")
    if [ "$size" != - ] && ((held != size)); then
        echo "error: $name: $held bytes came, the server said $size; the same command goes on with it" >&2
        return 1
    fi
    if ! has_checksum "$part"; then
        rm "$part"
        refuse "what came has another checksum than $check"
        return
    fi
    mv "$part" "$target"
    echo "$target: $held bytes"
}

[ -f "$table" ] || { echo "error: TABLE=$table is no file" >&2; exit 2; }
if [ $# = 0 ]; then
    echo "usage: bash scripts/download.sh NAME...; the names, and their places in $data/:" >&2
    rows | awk -F '\t' '{ printf "  %-24s %s\n", $1, $2 }' >&2
    exit 2
fi
for name in "$@"; do
    row=$(rows | awk -F '\t' -v name="$name" '$1 == name')
    if [ -z "$row" ]; then
        echo "error: '$name' is no published file; choose from $(rows | cut -f 1 | paste -sd , | sed 's/,/, /g')" >&2
        exit 2
    fi
    IFS=$'\t' read -r name target link inside check <<<"$row"
    target=$data/$target inside=${inside#-} check=${check#-}
    fetch
done
