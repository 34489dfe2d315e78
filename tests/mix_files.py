"""A data folder as the mix recipes expect it: a few rows of each published file, and their images.

Keys, ids and paths are those of the real files; every text is made up here. Each row says what must
become of it: "" for kept as it is, "mended:<what>" for kept, else "<stage>: <reason>". Copies of
rows of the same file are lost where a recipe drops duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from small_inputs import picture
from small_mixes import turns, write_images

Row = dict[str, Any]
COPY, REPLACED = "mix: duplicate_conversation", "mix: replaced"


class Planted(NamedTuple):
    """A row of a file, and what must become of it."""

    row: Any
    fate: str = ""


def _pictured(key: str, image: str, *texts: str, **extra: str) -> Row:
    first, *rest = texts
    said = turns(f"<image>\n{first}", *rest)
    return {"id": key, "image": image, "conversations": said, **extra}


def _share_gpt(key: str, *said: Row) -> Row:
    return {"id": key, "model": "", "conversations": list(said)}


COCO, OTHER_COCO = "coco/train2017/000000033471.jpg", "coco/train2017/000000052846.jpg"
GQA, TEXTVQA = "gqa/images/2354786.jpg", "textvqa/train_images/011e7e629fb9ae7b.jpg"
GIF, CUT = "ocr_vqa/images/140031996.jpg", "ocr_vqa/images/1437717772.jpg"
LOST = "ocr_vqa/images/0140449132.jpg"
VG, VG_EMPTY = "vg/VG_100K/2331508.jpg", "vg/VG_100K/30.jpg"
VG_2, OTHER_VG_2 = "vg/VG_100K_2/2.jpg", "vg/VG_100K_2/2407779.jpg"
LAION, HTML = "allava_laion/images/100277305.jpeg", "allava_laion/images/100277306.jpeg"
VFLAN_FOLDER = "allava_vflan/images/images_191task_1k"
VFLAN = f"{VFLAN_FOLDER}/VQA-E+visual_question_answering_574_COCO_train2014_000000119456.jpg"
VFLAN_PNG = f"{VFLAN_FOLDER}/PACS+guitar_image_category_classification_830_n03272010_10795-5.png"
VFLAN_WEBP = f"{VFLAN_FOLDER}/Places365+place_recognition_1_Places365_val_00000001.jpg"

IMAGES: dict[str, bytes] = {
    COCO: picture(shade=10),
    OTHER_COCO: picture(shade=20),
    GQA: picture(shade=30),
    TEXTVQA: picture(shade=40),
    GIF: picture(kind="GIF", shade=50),
    CUT: picture(shade=60)[:-30],
    VG: picture(shade=70),
    VG_EMPTY: picture(shade=80),
    VG_2: picture(shade=90),
    OTHER_VG_2: picture(shade=100),
    LAION: picture(shade=110),
    HTML: b"<!DOCTYPE html><html><body>404</body></html>",
    VFLAN: picture(shade=120),
    VFLAN_PNG: picture(kind="PNG", shade=130),
    VFLAN_WEBP: picture(kind="WEBP", shade=140),
}

SHORT = "Answer the question using a single word or phrase."
VQA = (f"What stands on the roof?\n{SHORT}", "Chimney", "How many?", "2")
REFERRED = ("Give the box of this region: left chair", "[0.03, 0.41, 0.22, 0.97]")
CHAT = ({"from": "human", "value": "How do I sort a list?"}, {"from": "gpt", "value": "Use sort."})
PART_OF = "The quick onset of the storm had surprised the town."

SVIT = (
    Planted(_pictured("svit_detail_0", VG, "Describe the scene.", "A street. " * 30)),
    Planted(
        _pictured(
            "svit_detail_1",
            VG_EMPTY,
            "Describe the image in detail.",
            "It seems like your message is empty. How can I assist you today?",
        ),
        "clean: message_is_empty",
    ),
    Planted(
        _pictured(
            "svit_conversation_0", OTHER_VG_2, "Who?", "A man.", "Where?", "Here.", "Y?", "N."
        )
    ),
    Planted(_pictured("svit_complex_0", VG, "Why is the street wet?", "It has rained.")),
    Planted(
        _pictured(
            "svit_referring_0",
            VG,
            "Where is the clock?",
            "There is <st>a clock<ed> [0.12, 0.30, 0.50, 0.77] on the wall.",
        )
    ),
    Planted(_pictured("llavav1.5_0", COCO, *VQA)),
    Planted(_pictured("llavav1.5_1", OTHER_COCO, *REFERRED)),
    Planted(_pictured("llavav1.5_2", GQA, f"Is it day?\n{SHORT}", "Yes")),
    Planted(_pictured("llavav1.5_3", GIF, "Who wrote this book?", "A. N. Author")),
    Planted(
        _pictured("llavav1.5_4", CUT, "What is its title?", "A Title"), "resolve: truncated_image"
    ),
    Planted(
        _pictured("llavav1.5_5", LOST, "What genre is it?", "Travel"), "resolve: missing_image"
    ),
    Planted(
        {
            "id": "llavav1.5_6",
            "image": TEXTVQA,
            "conversations": turns("Caption it.\n<image>", "A sign says STOP."),
        }
    ),
    Planted(_pictured("llavav1.5_7", VG_2, "What is in this region: [0, 0, 0.5, 1]?", "A tree.")),
    Planted(_pictured("llavav1.5_8", COCO, *VQA), COPY),
    Planted(
        {"id": "llavav1.5_9", "image": GQA, "conversations": turns("Is it night?", "No")},
        "clean: image_count",
    ),
    Planted(
        _pictured("llavav1.5_10", GQA, "What color is it?", "Red", "And that?"),
        "mended:dangling_human_turn",
    ),
    Planted(_share_gpt("wgByO4Y_0", *CHAT), REPLACED),
    Planted(_share_gpt("1XlMKEO_0", {"from": "gpt", "value": "Hello."}, *CHAT), REPLACED),
    Planted(_share_gpt("QRStUvW_3", CHAT[0], {"from": "gpt", "value": ""}), "clean: empty_turn"),
)

LLAVA = (
    Planted(_pictured("000000033471", COCO, "What is on the bus?", "The bus carries advertising.")),
    Planted(_pictured("000000033471", COCO, *VQA)),  # as SVIT's llavav1.5_0, and so on
    Planted(_pictured("2354786", GQA, f"Is it day?\n{SHORT}", "Yes")),
    Planted(_pictured("140031996", GIF, "Who wrote this book?", "A. N. Author")),
    Planted(_pictured("011e7e629fb9ae7b", TEXTVQA, "Caption it.", "A sign says STOP.")),
    Planted(_pictured("VG_100K_2/2", VG_2, "What is in this region: [0, 0, 0.5, 1]?", "A tree.")),
    Planted(_pictured("0140449132", LOST, "What genre is it?", "Travel"), "resolve: missing_image"),
    Planted(_share_gpt("wgByO4Y_0", *CHAT)),
    Planted(
        _share_gpt("Xx3aGZx_0", CHAT[0], {"from": "gpt", "value": "Write </s> at the end."}),
        "mended:end_string",
    ),
    Planted(
        _pictured("000000000009", "coco/train2017/../../secret.jpg", "What is it?", "A key."),
        "resolve: unsafe_image_path",
    ),
    Planted(
        _pictured("000000033472", COCO, "What is on the bus?", "The bus carries advertising."), COPY
    ),
    Planted(
        _share_gpt("Vp3qLrT_7", CHAT[0], CHAT[0], CHAT[1]),
        "clean: roles_not_alternating",
    ),
)
FIRST_COPIED, LAST_COPIED = 1, 5
"""Rows of LLAVA that SVIT has too, under other ids."""

WIZARDLM = (
    Planted({"instruction": "Name three rivers.", "output": "Rhine, Nile, Amazon."}),
    Planted({"instruction": "Choose: red or blue?", "output": "red"}),
    Planted({"instruction": "Say nothing.", "output": ""}, "clean: empty_turn"),
    Planted(
        {"instruction": f"Correct this: {PART_OF}", "output": PART_OF}, "clean: repeated_output"
    ),
    Planted({"instruction": "Name three rivers.", "output": "Rhine, Nile, Amazon."}, COPY),
    Planted(
        {"instruction": "How does GPT-2 end a text?", "output": "With <|endoftext|>."},
        "mended:end_string",
    ),
    Planted(
        {"instruction": "Parse <image> in this XML.", "output": "It is an element."},
        "clean: image_count",
    ),
    Planted("not a row", "ingest: not_an_object"),
)


def _laion(number: int, image: str, *texts: str) -> Row:
    extra = {"original_caption": f"Ring no. {number}", "url": f"https://shop.example/{number}.jpg"}
    return _pictured(f"allava_laion_inst_{number}", image, *texts, **extra)


ALLAVA_LAION = (
    Planted(_laion(100277305, LAION, "What adds to its worth?", "The stones along its edge.")),
    Planted(
        _laion(100277307, "allava_laion/images/100277307.jpeg", "What is it?", "A mug."),
        "resolve: missing_image",
    ),
    Planted(
        _laion(100277308, LAION, "Translate the text about <image>.", "<image> 翻译。"),
        "clean: image_count",
    ),
    Planted(_laion(100277306, HTML, "What is sold?", "Shoes."), "resolve: unknown_format"),
)
ALLAVA_VFLAN = (
    Planted(_pictured("allava_vflan_inst_9", VFLAN, "Is a boar there?", "Yes, in the grass.")),
    Planted(_pictured("allava_vflan_inst_10", VFLAN_PNG, "Class of it?", "A guitar, in lines.")),
    Planted(_pictured("allava_vflan_inst_11", VFLAN_WEBP, "What place is it?", "An airfield.")),
)

FILES: Mapping[str, tuple[str, Sequence[Planted]]] = {
    "svit": ("SVIT_mix_665K.json", SVIT),
    "llava": ("llava_v1_5_mix665k.json", LLAVA),
    "wizardlm": ("alpaca_evol_instruct_70k.json", WIZARDLM),
    "allava_laion": ("allava_laion/ALLaVA-Instruct-LAION-4V.json", ALLAVA_LAION),
    "allava_vflan": ("allava_vflan/ALLaVA-Instruct-VFLAN-4V.json", ALLAVA_VFLAN),
}
"""Name of a source in the recipes -> its file in the data folder, and its rows."""

CORE = ("SVIT detail", "SVIT conversation", "SVIT complex", "SVIT referring")
OF_PATH = ("GQA", "OCR-VQA", "TextCaps", "Visual Genome", "ShareGPT")
OTHER_COCO = "VQAv2 + OKVQA + A-OKVQA + RefCOCO"
BUNNY = {"SVIT-mix-665K": 19, "SVIT-core-150K": 5, "WizardLM": 8}
ALLAVA = {"ALLaVA-Instruct-LAION-4V": 4, "ALLaVA-Instruct-VFLAN-4V": 3}
BOTH_CHATS = {"ShareGPT of SVIT-mix": 3, "ShareGPT of LLaVA": 3, "LLaVA-v1.5-mix665K": 12}
IN_SMALL_FILES = {
    "bunny_695k": BUNNY
    | dict(zip(CORE, (2, 1, 1, 1), strict=True))
    | dict(zip(OF_PATH, (3, 3, 1, 1, 3), strict=True))
    | {OTHER_COCO: 3, "Bunny-695K": 24},
    "llava_665k": dict(zip(OF_PATH, (1, 2, 1, 1, 3), strict=True))
    | {"LLaVA-v1.5-mix665K": 12, "images of COCO": 4},
    "bunny_llava_1.4m": BUNNY | BOTH_CHATS | {"Bunny-LLaVA-1.4M": 36},
    "bunny_allava_1.3m": BUNNY | ALLAVA | {"ShareGPT": 3, "Bunny-ALLaVA-1.3M": 31},
    "bunny_llava_allava_2m": BUNNY | ALLAVA | BOTH_CHATS | {"Bunny-LLaVA-ALLaVA-2M": 43},
}
"""Recipe -> published name -> rows of these files that it means, counted by hand."""


def write_data(folder: Path) -> None:
    """Write all files and images as <folder>/data/, which is where the recipes look."""
    data = folder / "data"
    write_images(data, IMAGES)
    for name, planted in FILES.values():
        text = json.dumps([one.row for one in planted], ensure_ascii=False)
        (data / name).write_text(text, encoding="utf-8")
