"""The table [images]: what is fetched, decoded and encoded of the images that requests bring."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal

import msgspec

from lightllmd.config.setting import Setting

HOST = r"[A-Za-z0-9._-]+|\*\.[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?"


class ImagesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Images in requests, with enable_multimodal: where they may come from, how large they may be."""

    urls: Annotated[
        bool,
        Setting(
            doc="Whether the visual worker fetches images that a request names by an http or https URL. false: such "
            "requests are refused; images in the request itself (base64, data URIs) are taken."
        ),
    ] = True
    timeout: Annotated[
        float,
        Setting(
            doc="Within this an image has to be fetched, from the look-up of its host to its last byte, redirects "
            "included; then 400.",
            unit="s",
            above=0,
            maximum=3600,
        ),
    ] = 10.0
    max_redirects: Annotated[
        int,
        Setting(
            doc="Redirects that are followed to an image, each to an address that is allowed too.",
            unit="redirects",
            minimum=0,
            maximum=20,
        ),
    ] = 3
    allowed_hosts: Annotated[
        list[str],
        Setting(
            doc='Hosts that images are fetched from: names, names with their subdomains as "*.example.org", '
            "addresses. Empty: all whose addresses are allowed.",
            pattern=HOST,
            form='a host name, "*.example.org" or an IP address, without scheme and port',
            example='["images.example.org", "*.cdn.example.org"]',
        ),
    ] = []
    allowed_networks: Annotated[
        list[str],
        Setting(
            doc="Networks that images are fetched from although they are not public: private, loopback and link-local "
            "addresses, the metadata services of clouds among them, are refused otherwise, whatever name leads there.",
            pattern=r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?",
            form='an address or a network such as "10.1.0.0/16"',
            example='["10.1.0.0/16"]',
        ),
    ] = []
    file_root: Annotated[
        str,
        Setting(
            doc="Folder below which file:// URLs of requests may name images; links that lead out of it are not "
            "followed. Empty: such requests are refused.",
            pattern=r"(/.*)?",
            form="an absolute path",
            example='"/srv/images"',
        ),
    ] = ""
    max_bytes: Annotated[
        int,
        Setting(
            doc="Longest file of an image, as it is fetched or as base64 says it; [http] max_body_bytes bounds what is "
            "in a body, too.",
            unit="bytes",
            minimum=1024,
            maximum=1 << 30,
        ),
    ] = 20 << 20
    max_pixels: Annotated[
        int,
        Setting(
            doc="Most pixels of an image, width times height, found in its header before it is decoded.",
            unit="pixels",
            minimum=1,
            maximum=1 << 30,
        ),
    ] = 50_000_000
    max_images: Annotated[
        int,
        Setting(
            doc="Most images of one request; cache_capacity is a bound, too.",
            unit="images",
            minimum=1,
            maximum=65536,
        ),
    ] = 64
    max_held_bytes: Annotated[
        int,
        Setting(
            doc="Most bytes of images that an api worker keeps for requests that run or wait, so that a visual worker "
            "that was started again is shown them; then 429.",
            unit="bytes",
            minimum=1 << 20,
            maximum=1 << 40,
        ),
    ] = 1 << 30
    room_timeout: Annotated[
        float,
        Setting(
            doc="How long a request waits while the image cache is full of images that others use, then 503.",
            unit="s",
            above=0,
            maximum=3600,
        ),
    ] = 30.0
    batch: Annotated[
        int,
        Setting(
            doc="Most images, or tiles of images, that the encoder takes at a time: more are faster on a GPU; its "
            "working memory grows with them.",
            unit="images",
            minimum=1,
            maximum=1024,
        ),
    ] = 8
    device: Annotated[
        Literal["auto", "cpu"],
        Setting(
            doc="Where images are encoded. auto: beside the engine, on its first device, which the memory budget "
            "allows for. cpu: on the CPU, which leaves all of a GPU to the engine and is slow."
        ),
    ] = "auto"


def reserved(capacity: int, ratio: float) -> int:
    """Images that stay when room is made in a full cache of `capacity`: cache_reserved_ratio in numbers. At least one
    goes."""
    return min(capacity - 1, int(capacity * ratio))


def network_faults(settings: ImagesSettings) -> str:
    """What of allowed_networks is no network."""
    wrong = []
    for written in settings.allowed_networks:
        try:
            ip_network(written, strict=False)
        except ValueError as fault:
            wrong.append(str(fault))
    return "; ".join(wrong)
