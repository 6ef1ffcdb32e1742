_base_ = [
    '../_base_/models/upernet_swin.py',  # UPerNet with Swin-T
    '../_base_/datasets/coco-stuff10k_513x513.py',  # COCO-Stuff 10k, 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd2e-4.py'  # SGD, lr 0.01, wd 2e-4, 30k
]
crop_size = (513, 513)
# Images are padded to the crop's size at test, too.
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
checkpoint_file = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(
        num_classes=171,
        dropout_ratio=0,
        norm_cfg=dict(eps=1e-3),
        align_corners=True),
    auxiliary_head=None)
