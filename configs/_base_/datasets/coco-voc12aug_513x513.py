# COCO with labels in VOC's 21 classes, VOC 2012 and SBD mixed: the first of KSAC's stages.
# tools/dataset_converters/coco_voc.py makes the labels and the list of COCO's images.
_base_ = './pascal_voc12_aug_513x513.py'  # VOC and SBD, pipelines, validation set

dataset_coco = dict(
    type='PascalVOCDataset',
    data_root='data/coco',
    data_prefix=dict(img_path='train2017', seg_map_path='voc_train2017'),
    ann_file='voc_train2017/images.txt',
    pipeline={{_base_.train_pipeline}})

train_dataloader = dict(
    dataset=dict(datasets=[dataset_coco, {{_base_.dataset_train}}, {{_base_.dataset_aug}}]))
