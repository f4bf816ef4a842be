"""Data sets of videos, as folders of frames."""

from .patterns import Files, Layout

VIDEO: dict[str, Layout] = {
    "NTURain": Layout(
        title="synthetic rain on videos: 8 training sequences, each with several versions of rain, and 8 test "
        "sequences; also real videos for prediction",
        folders=("NTURain", "NTU-derain", "SPAC-SupplementaryMaterials", "SPAC-SupplementaryMaterials-master"),
        files={
            "train": (
                Files(
                    "(?:Dataset_Training_Synthetic/)?{sequence}_Rain_{version}/{frame}",
                    "(?:Dataset_Training_Synthetic/)?{sequence}_GT/{frame}",
                    video=True,
                ),
            ),
            "test": (
                Files(
                    "(?:Dataset_Testing_Synthetic/)?{sequence}_Rain/{frame}",
                    "(?:Dataset_Testing_Synthetic/)?{sequence}_GT/{frame}",
                    video=True,
                ),
            ),
            "predict": (Files("(?:Dataset_Testing_RealRain/)?{sequence}_Rain/{frame}", video=True),),
        },
        source="https://github.com/hotndy/SPAC-SupplementaryMaterials",
        citation="Chen et al., Robust Video Content Alignment and Compensation for Rain Removal in a CNN Framework, "
        "CVPR 2018",
        protocols="luma in 8 bit, SSIM with σ 0.5 (VDMamba), mean over sequences; S2VD omits two frames at each end; "
        "derain's closest protocol is restormer, with the mean over sequences",
        remarks=("folders named _spacCNN contain results of the authors' method, and are ignored",),
    ),
    "VRDS": Layout(
        title="synthetic drops and streaks on videos, 72 training and 30 test sequences",
        folders=("VRDS",),
        # Equal patterns: the folder train or test may precede any pattern (SPLIT_FOLDERS).
        files={
            "train": (Files("lq/{sequence}/{frame}", "gt/{sequence}/{frame}", video=True),),
            "test": (Files("lq/{sequence}/{frame}", "gt/{sequence}/{frame}", video=True),),
        },
        source="https://github.com/TonyHongtaoWu/ViMP-Net",
        citation="Wu et al., Mask-Guided Progressive Network for Joint Raindrop and Rain Streak Removal in Videos, "
        "ACM MM 2023",
        protocols="rgb, with the mean over sequences (ViMP-Net, RainMamba)",
        remarks=("folders of streak maps and drop masks are ignored",),
    ),
}
"""Data sets of videos."""
