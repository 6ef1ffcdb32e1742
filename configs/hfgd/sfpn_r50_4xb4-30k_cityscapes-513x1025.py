_base_ = [
    '../_base_/models/hfgd_r50.py',  # HFGD with ResNet-50
    '../_base_/datasets/cityscapes_513x1025_plain.py',  # Cityscapes
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 1025)
data_preprocessor = dict(size=crop_size)
# Semantic FPN: none of the three parts.
model = dict(
    data_preprocessor=data_preprocessor,
    # As the rows with axial attention beside it.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(342, 683)),
    decode_head=dict(
        upsampler=dict(type='SemanticFPNHead'),
        encoder=None,
        guidance=False,
        axial_attention=False,
        num_classes=19))
train_dataloader = dict(batch_size=4, num_workers=4)
