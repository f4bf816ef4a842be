"""Sources of the public data sets: mirrors on the Hugging Face hub, archives on web servers, and pages with a form.

The entries were compiled in December 2026 from stored copies of the pages that they name, without downloading the data
sets.
"""

from dataclasses import dataclass
from typing import ClassVar

from derain.data.layouts import LAYOUTS
from derain.errors import DerainError

NO_LICENCE = "none known; see the authors' page"
NONE_STATED = "none stated; the mirror's author found none"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of a data set.

    Attributes:
        kind: Kind of source, as ``--from`` accepts it.
        licence: Licence or terms as the authors state them.
        note: Differences from the authors' data set, or other advice.
    """

    kind: ClassVar[str]
    licence: str = NO_LICENCE
    note: str = ""


@dataclass(frozen=True)
class Hub(Source):
    """Repository on the Hugging Face hub.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        patterns: Glob patterns of the files; all files by default.
    """

    kind: ClassVar[str] = "hub"
    repository: str
    revision: str = "main"
    patterns: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return ``hub:OWNER/NAME``."""
        return f"hub:{self.repository}"


@dataclass(frozen=True)
class Web(Source):
    """Archives on a web server.

    Attributes:
        urls: Addresses of the archives.
        sha256: SHA-256 of each archive in hexadecimal digits; empty if the authors publish none.
    """

    kind: ClassVar[str] = "web"
    urls: tuple[str, ...]
    sha256: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the addresses."""
        return " ".join(self.urls)


@dataclass(frozen=True)
class Form(Source):
    """Page from which only a person can download: a form, a login, or a file host without stable addresses.

    Attributes:
        page: Address of the page.
        steps: What to download there, and what to do with it.
    """

    kind: ClassVar[str] = "form"
    page: str
    steps: str

    def __str__(self) -> str:
        """Return the address of the page."""
        return self.page


_PKU = "http://www.icst.pku.edu.cn/struct/att"
_PKU_NOTE = "reported as unreachable by some users"
_PRENET = "https://github.com/csdwren/PReNet"
_RESTORMER = "https://github.com/swz30/Restormer/tree/main/Deraining"
_CROPPED = "the version cropped to 480x320 that Restormer distributes, in an unofficial mirror"
_BAIDU = "download the archive from Baidu (needs an account)"
_LINKS = "download the archives by the links of the page"
_DRIVE_OR_BAIDU = "download the archives from Google Drive or Baidu, by the links of the page"
_DRIVE = "download the archive from Google Drive in a browser"


def _rain13k_part(name: str, note: str = "unofficial mirror") -> Hub:
    return Hub("dronefreak/Rain13K", patterns=(f"*{name}/*",), note=note)


def _restormer(archive: str) -> Form:
    return Form(_RESTORMER, f"{_DRIVE} ({archive})")


def _yang(name: str) -> Web:
    return Web((f"{_PKU}/{name}.zip",), note=_PKU_NOTE)


_OLD_VERSION = Form(_PRENET, f"{_BAIDU}; the page has the first version of the set")
_RAIN_TRAIN_H = (_yang("RainTrainH"), _OLD_VERSION)
_NEW_VERSION = Form(
    "https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html",
    f"{_LINKS}; they have the second version of the set",
)

_RAINDROP = (
    Hub("dronefreak/RainDrop", licence=NONE_STATED, note="unofficial mirror"),
    Form("https://drive.google.com/open?id=1e7R76s6vwUJxILOcAsthgDLPSnOrQ49K", f"{_DRIVE}; train, test_a and test_b"),
)
_OUTDOOR_RAIN = (Form("https://github.com/liruoteng/HeavyRainRemoval", _LINKS),)
_ALL_WEATHER = (Form("https://github.com/jeya-maria-jose/TransWeather", _LINKS),)
_SNOW_SERVER = "https://desnownet.s3.amazonaws.com/dataset_synthetic"


def _realrain(letter: str) -> tuple[Source, ...]:
    mirror = Hub(
        "dronefreak/RealRain-1k",
        patterns=(f"*1k-{letter}/*", f"{letter}/*"),
        note="unofficial mirror; its folder names could not be confirmed",
    )
    return mirror, Form("https://github.com/hiker-lw/RealRain-1k", _LINKS)


def _rainds(kind: str) -> tuple[Source, ...]:
    mirror = Hub(
        "dronefreak/RainDS",
        patterns=(f"*RainDS?{kind}/*",),
        note="unofficial mirror; its folder names could not be confirmed",
    )
    page = "https://drive.google.com/file/d/12yN6avKi4Tkrnqa3sMUmyyf4FET9npOT/view"
    return mirror, Form(page, f"{_DRIVE}; the link is that of https://github.com/Songforrr/RainDS_CCN")


SOURCES: dict[str, tuple[Source, ...]] = {
    "Rain100L": (_yang("Rain100L"), _rain13k_part("Rain100L", _CROPPED), _OLD_VERSION),
    "Rain100H": (_yang("Rain100H"), _rain13k_part("Rain100H", _CROPPED), _OLD_VERSION),
    "RainTrainL": (_yang("RainTrainL"), _OLD_VERSION),
    "RainTrainH": _RAIN_TRAIN_H,
    "RainTrainH-full": _RAIN_TRAIN_H,
    "Rain800": (
        Form(
            "https://drive.google.com/open?id=0Bw2e6Q0nQQvGbi1xV1Yxd09rY2s",
            f"{_DRIVE}; the link is that of https://github.com/hezhangsprinter/ID-CGAN",
        ),
    ),
    "Rain200L": (_NEW_VERSION,),
    "Rain200H": (_NEW_VERSION,),
    "Rain1200": (
        Form(
            "https://drive.google.com/file/d/1cMXWICiblTsRl1zjN8FizF5hXOpVOJz4/view",
            f"{_DRIVE}; the link is that of https://github.com/hezhangsprinter/DID-MDN",
        ),
    ),
    "Rain1400": (
        Hub("dronefreak/DDN-Data", licence=NONE_STATED, note="unofficial mirror"),
        Form("https://xueyangfu.github.io/projects/cvpr2017.html", _DRIVE_OR_BAIDU),
    ),
    "Rain12": (
        Web(("http://yu-li.github.io/paper/li_cvpr16_rain.zip",), note="reported as dead in August 2026"),
        Form(_PRENET, f"{_BAIDU}; the folder of test sets contains Rain12"),
    ),
    "Rain13K": (
        Hub("dronefreak/Rain13K", note="unofficial mirror, with the five test sets"),
        Form(
            _RESTORMER,
            "download the archives of training and test from Google Drive: "
            "https://drive.google.com/file/d/14BidJeG4nSNuFNFDf99K-7eErCq4i47t (training), "
            "https://drive.google.com/file/d/1P_-RAvltEoEhfT-9GrWRdpEi6NSswTs8 (test)",
        ),
    ),
    "Test100": (_rain13k_part("Test100"), _restormer("test")),
    "Test1200": (_rain13k_part("Test1200"), _restormer("test")),
    "Test2800": (_rain13k_part("Test2800"), _restormer("test")),
    "SPA-Data": (
        Hub(
            "dronefreak/SPA-Data",
            licence="License.txt in the authors' archives",
            note="unofficial mirror of a part: 6,385 training pairs instead of 638,492, by the mirror's author",
        ),
        Form(
            "https://stevewongv.github.io/derain-project.html",
            "download real_world.zip.00 to .11 (about 44 GB) and join them: cat real_world.zip.* > real_world.zip; "
            "download real_test_1000.zip (about 455 MB)",
            licence="License.txt in the authors' archives",
        ),
    ),
    "HQ-RAIN": (
        Form(
            "https://github.com/cschenxiang/HQ-RAIN/issues/1",
            "download HQ-RAIN_train_input.zip, HQ-RAIN_train_target.zip and HQ-RAIN_test_input.zip from Dropbox; "
            "https://github.com/cschenxiang/HQ-RAIN has the other links",
        ),
    ),
    "4K-Rain13k": (Form("https://github.com/cschenxiang/UDR-Mixer", _DRIVE_OR_BAIDU),),
    "RealRain-1k-L": _realrain("L"),
    "RealRain-1k-H": _realrain("H"),
    "GT-RAIN": (
        Form(
            "https://drive.google.com/drive/folders/1NSRl954QPcGIgoyJa_VjQwh_gEaHWPb8",
            f"{_DRIVE}: GT-RAIN_train.zip, GT-RAIN_val.zip and the test set; the link is that of "
            "https://github.com/UCLA-VMG/GT-RAIN",
            licence="research only (the authors' page)",
        ),
    ),
    "LHP-Rain": (
        Form(
            "https://yunguo224.github.io/LHP-Rain.github.io/",
            "choose the full or the simple version, and follow the links of the page",
        ),
    ),
    "Rain-in-driving": (Form("https://github.com/panda-lab/Single-Image-Deraining", _LINKS),),
    "Raindrop": _RAINDROP,
    "Raindrop-B": _RAINDROP,
    "RainDS-real": _rainds("real"),
    "RainDS-syn": _rainds("syn"),
    "UAV-Rain1k": (Form("https://github.com/cschenxiang/UAV-Rain1k", _LINKS),),
    "RainCityscapes": (
        Form(
            "https://www.cityscapes-dataset.com/downloads/",
            "register, and download the rain images (leftImg8bit_rain) and leftImg8bit",
            licence="terms of Cityscapes, at registration",
        ),
    ),
    "Outdoor-Rain": _OUTDOOR_RAIN,
    "Outdoor-Rain-Test1": _OUTDOOR_RAIN,
    "Snow100K": (
        Web(
            (f"{_SNOW_SERVER}/train/Snow100K-training.tar.gz", f"{_SNOW_SERVER}/test/Snow100K-testset.tar.gz"),
            note="the authors' storage server, as other repositories name it",
        ),
        Form("https://sites.google.com/view/yunfuliu/desnownet", _LINKS),
    ),
    "AllWeather": _ALL_WEATHER,
    "AllWeather-rain": _ALL_WEATHER,
    "NTURain": (
        Form(
            "https://github.com/hotndy/SPAC-SupplementaryMaterials",
            "git clone the repository into the data root, as NTURain, and unpack its .rar files there; "
            "instead of --archive, run: derain data verify NTURain",
        ),
    ),
    "VRDS": (Form("https://github.com/TonyHongtaoWu/ViMP-Net", _LINKS),),
}
"""Sources by data set, for all layouts except the general ones; the first source is used by default."""


def find_name(name: str) -> str:
    """Return the name of a data set in the spelling of `LAYOUTS`; case is ignored.

    Raises:
        DerainError: If there is no such data set, or it is a general layout.
    """
    for known in SOURCES:
        if known.lower() == name.lower():
            return known
    raise DerainError(f"{name}: no such data set; choose from {', '.join(SOURCES)}")


def choose_source(name: str, choice: str | None) -> Source:
    """Return a source of a data set.

    Args:
        name: Name of the data set, as `find_name` returns it.
        choice: ``hub``, ``web`` or ``form``; ``hub:OWNER/NAME``, optionally with ``@REVISION``; or an address that
            begins with ``http://`` or ``https://``. None for the first source of the data set.

    Raises:
        DerainError: If the data set has no such source.

    Example:
        >>> str(choose_source("Rain100L", "hub"))
        'hub:dronefreak/Rain13K'
        >>> str(choose_source("Rain100L", "https://example.org/Rain100L.zip"))
        'https://example.org/Rain100L.zip'
    """
    sources = SOURCES[name]
    if choice is None:
        return sources[0]
    if choice.startswith("hub:"):
        repository, _, revision = choice.removeprefix("hub:").partition("@")
        return Hub(repository, revision or "main", licence="not known to derain; see its page")
    if choice.startswith(("http://", "https://")):
        return Web((choice,), licence="not known to derain; see its page")
    for source in sources:
        if source.kind == choice:
            return source
    kinds = ", ".join(source.kind for source in sources)
    raise DerainError(
        f"--from {choice}: no such source of {name}; choose {kinds}, hub:OWNER/NAME or the address of an archive"
    )


def target_folder(name: str) -> str:
    """Return the name of a data set's folder below the data root."""
    return LAYOUTS[name].folders[0]
