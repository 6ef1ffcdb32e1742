_base_ = [
    '../_base_/models/ccnet_r50-d8.py',  # CCNet with ResNet-50, output stride 8
    '../_base_/datasets/coco-stuff10k_513x513.py',  # COCO-Stuff 10k, 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=171),
    auxiliary_head=None)
