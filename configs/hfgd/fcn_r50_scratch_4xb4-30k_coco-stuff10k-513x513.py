_base_ = './fcn_r50_4xb4-30k_coco-stuff10k-513x513.py'
# Random initial weights.
model = dict(pretrained=None)
