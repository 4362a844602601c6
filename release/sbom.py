"""Bills of materials in CycloneDX's format, the same bytes for the same contents."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.parser import HeaderParser

from checks import Commit
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from errors import ReleaseError
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/udpwatch")


@dataclass(frozen=True)
class Contents:
    """What a release file has in it: METADATA of each Python package, dpkg's status file, and which Debian that is."""

    python: list[str]
    dpkg_status: str = ""
    distribution: str = ""


def write(contents: Contents, name: str, version: str, commit: Commit) -> str:
    """Return the bill of materials of the file ``name`` as JSON. Raise ReleaseError if it violates the schema."""
    packages = {
        canonicalize_name(message["Name"]): message for message in map(HeaderParser().parsestr, contents.python)
    }
    components = {package: _python(message) for package, message in packages.items()}
    debian = [_debian(message, contents.distribution) for message in _paragraphs(contents.dpkg_status)]
    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, f"{name} {commit.sha}"))
    bom.metadata.timestamp = datetime.fromtimestamp(commit.time, UTC)
    bom.metadata.properties.add(Property(name="udpwatch:commit", value=commit.sha))
    if debian:
        bom.metadata.component = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name)
        bom.register_dependency(bom.metadata.component, [*components.values(), *debian])
    else:
        bom.metadata.component = components["udpwatch"]
    for component in [*components.values(), *debian]:
        if component is not bom.metadata.component:
            bom.components.add(component)
    for package, message in packages.items():
        bom.register_dependency(
            components[package], [components[each] for each in _needs(message) if each in components]
        )
    text: str = JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ReleaseError(f"cannot write the SBOM of {name}: {str(error).splitlines()[0]}")
    return text


def _python(message: Message) -> Component:
    purl = PackageURL("pypi", name=canonicalize_name(message["Name"]), version=message["Version"])
    return Component(
        name=message["Name"],
        version=message["Version"],
        type=ComponentType.APPLICATION if message["Name"] == "udpwatch" else ComponentType.LIBRARY,
        description=message["Summary"],
        licenses=_licenses(message),
        purl=purl,
        bom_ref=str(purl),
    )


def _licenses(message: Message) -> list[License]:
    """Return the licence of a package: an SPDX expression, or the name that its author gave."""
    classifiers = [line.split(" :: ") for line in message.get_all("Classifier", []) if line.startswith("License ::")]
    names = [parts[-1] for parts in classifiers if parts[-1] != "OSI Approved"]
    text = message["License-Expression"] or message["License"] or next(iter(names), "")
    # Some packages have their licence's whole text there.
    return [LicenseFactory().make_from_string(text)] if text and "\n" not in text else []


def _needs(message: Message) -> list[str]:
    """The names of the packages that a package requires without its extras."""
    requirements = [Requirement(line) for line in message.get_all("Requires-Dist", [])]
    met = [each for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return sorted({canonicalize_name(each.name) for each in met})


def _paragraphs(status: str) -> Iterable[Message]:
    messages = (HeaderParser().parsestr(paragraph) for paragraph in status.split("\n\n") if paragraph.strip())
    return [message for message in messages if message["Status"].endswith(" installed")]


def _debian(message: Message, distribution: str) -> Component:
    name, version = message["Package"], message["Version"]
    qualifiers = {"arch": message["Architecture"], "distro": distribution}
    if message["Source"]:  # vulnerabilities are listed by source package
        source, _, rest = message["Source"].partition(" ")
        qualifiers["upstream"] = f"{source}@{rest.strip('()')}" if rest else source
    purl = PackageURL("deb", namespace="debian", name=name, version=version, qualifiers=qualifiers)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl))
