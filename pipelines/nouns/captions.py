"""COCO captions, one at a time: `{"images": [...], "annotations": [{"image_id": 1, "caption": "A dog."}]}`.

The file of COCO's training images holds 591,753 of them.
"""

from collections.abc import Iterator
from pathlib import Path

from hdovd.core.errors import HdovdError
from hdovd.core.json_stream import JsonStream
from hdovd.core.text_files import shown
from hdovd.data.coco import whole


class Captions:
    """Iterates over `(image id, caption)`; `images` then holds the ids that the file lists, those without captions too.

    Iterating raises HdovdError if there is no such file, or an entry is no caption.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.images = path, set[int]()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        self.images.clear()
        stream, number = JsonStream(self.path, "captions"), 0
        for key, item in stream:
            if key == "images" and key in stream.lists and isinstance(item, dict) and "id" in item:
                self.images.add(whole(item["id"], f"{self.path}: an image's id"))
            if key != "annotations" or key not in stream.lists:
                continue
            where = f"{self.path}: entry {number} of annotations"
            if not isinstance(item, dict) or not {"image_id", "caption"} <= item.keys():
                raise HdovdError(f"{where} is no {{image_id, caption}}")
            if not isinstance(item["caption"], str):
                raise HdovdError(f"{where}: caption is {shown(item['caption'])}, expected text")
            image_id = whole(item["image_id"], f"{where}: image_id")
            number += 1
            self.images.add(image_id)
            yield image_id, item["caption"].encode(errors="replace").decode()  # halves of surrogate pairs are no text
        if "annotations" not in stream.lists:
            raise HdovdError(f"{self.path} is no COCO captions file: it needs annotations of {{image_id, caption}}")
