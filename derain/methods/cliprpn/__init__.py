"""CLIP-RPN (Guan and Yoshie): CLIP classifies the rain and routes images to sub-networks of a Restormer."""
