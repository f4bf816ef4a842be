"""CLIP-RPN (Guan and Yoshie): CLIP perceives the rain and routes images to sub-networks of Restormer."""
