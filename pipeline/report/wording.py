"""What the report calls things: stages, scores, and one sentence for each of them."""

from __future__ import annotations

STAGES = {
    "world": "The demo's drawn images",
    "embed": "A vector per image of the index",
    "retrieve": "The top-k images of each category",
    "mask": "A pseudo-mask per archive image",
    "bank": "Regions of the images: what they look like, and mean",
    "pseudo_label": "A label per pixel, training-free",
    "train": "The segmenter, on pseudo-labels alone",
    "relabel": "Labels by the student, for a further round",
    "retrain": "A further round: kept, or rejected",
    "predict_bench": "Predictions on labelled images",
    "score": "Scores of the predictions",
    "report": "This page",
}
ITEM_NAMES = {"train": "iterations", "audit": "items"}

BENCH_COLUMNS = {
    "miou": "mIoU",
    "baseline_miou": "Baseline mIoU",
    "miou_seen": "Seen mIoU",
    "miou_unseen": "Unseen mIoU",
    "hiou": "hIoU",
    "miou_s": "mIoU S",
    "miou_ms": "mIoU MS",
    "miou_ml": "mIoU ML",
    "miou_l": "mIoU L",
    "iou": "IoU",
    "pixel_acc": "Pixel acc.",
    "pixel_acc_seen": "Seen pixel acc.",
    "pixel_acc_unseen": "Unseen pixel acc.",
    "mean_acc": "Mean acc.",
    "mean_acc_seen": "Seen mean acc.",
    "mean_acc_unseen": "Unseen mean acc.",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "baseline_ap": "Baseline AP",
    "baseline_ap50": "Baseline AP50",
    "baseline_ap75": "Baseline AP75",
    "ap_unseen": "Unseen AP",
    "ap50_unseen": "Unseen AP50",
    "ap_agnostic": "Agnostic AP",
    "ap50_agnostic": "Agnostic AP50",
    "ap75_agnostic": "Agnostic AP75",
}
PLUS_ROWS = {
    "teacher": "Teacher, DenseCLIP alone",
    "guided": "Guided",
    "self_trained": "Self-trained",
}
AUDIT_MEASURES = {
    "archive_precision": (
        "Archive precision",
        "archive images that do show the category they were found for",
    ),
    "negative_precision": ("Negative precision", "negatives that show no category"),
    "mask_iou": ("Pseudo-mask IoU", "overlap of pseudo-mask and all objects of the image"),
    "mask_iou_category": (
        "Pseudo-mask IoU, category",
        "overlap of pseudo-mask and the objects of the archive's category",
    ),
    "label_miou_saliency": (
        "Pseudo-label mIoU, saliency",
        "labels that are the archive's category inside the pseudo-mask, background outside",
    ),
    "label_miou_denseclip": ("Pseudo-label mIoU, denseclip", "dense labels alone"),
    "label_miou_fused": (
        "Pseudo-label mIoU, fused",
        "saliency, corrected or ignored where dense labels are sure of something else",
    ),
    "label_ignored_fused": ("Ignored by fused", "pixels that the target fused leaves out"),
}
GLOSSARY = {
    "mIoU": "overlap of predicted and true pixels of a class (intersection over union), averaged "
    "over all classes and background, from one confusion matrix over the whole benchmark.",
    "Baseline": "a dense labeller alone, training-free: every patch of the image encoder takes the "
    "nearest category name. The protocol says which one. Its objects are regions of its labels.",
    "Pixel acc.": "share of all labelled pixels whose class is predicted right.",
    "Mean acc.": "the same share for each class by itself, averaged over the classes.",
    "AP": "area under the precision-recall curve of whole objects, averaged over categories and "
    "over the overlaps from 0.50 to 0.95 at which an object counts as found.",
    "AP50, AP75": "the same at one overlap: 0.50, roughly right, and 0.75, tight.",
    "Agnostic AP": "AP with all categories taken for one: are objects found, whatever their name?",
    "IoU of a class": "its overlap alone; a class that never occurs has none.",
}
# Said only where a benchmark has that score.
GLOSSARY_OF_SCORES = {
    "hiou": {
        "Seen, unseen": "scores over the categories that a zero-shot split lets training name, and "
        "over those it does not; hIoU is the harmonic mean of both mIoU."
    },
    "miou_s": {
        "mIoU S, MS, ML, L": "mIoU by the share of the image that a category covers: up to 5, 25, "
        "50 and 100 %."
    },
}
