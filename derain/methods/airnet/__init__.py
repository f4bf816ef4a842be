"""AirNet (Li et al., CVPR 2022): restoration guided by a degradation encoder, which a contrastive loss trains."""
