_base_ = [
    '../_base_/models/deeplabv3_r50-d8.py',  # DeepLabV3 with ResNet-50, output stride 8
    '../_base_/datasets/coco-stuff10k_513x513.py',  # COCO-Stuff 10k, 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd2e-4.py'  # SGD, lr 0.01, wd 2e-4, 30k
]
crop_size = (513, 513)
# Images are padded to the crop's size at test, too.
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(multi_grid=(4, 8, 16)),  # 4 times 1, 2, 4
    decode_head=dict(
        channels=256, num_classes=171,
        dropout_ratio=0,
        norm_cfg=dict(eps=1e-3),
        align_corners=True),
    auxiliary_head=None)
